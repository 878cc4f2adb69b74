"""Imports the trainer once and forks a run of it for each order: starting Python anew for every kill takes minutes.

An order is a line of JSON on standard input: `flags`, `world_size`, `port`, `log` (the start of a file name; the rank
follows) and what shall go wrong. The process ids are answered at once, the exit codes at the end, each a line of JSON.
"""

import gc
import importlib
import json
import os
import sys
import time

gc.disable()  # what is imported stays: to look through it for garbage takes a fifth of the time
main = importlib.import_module("hf_vicreg.training.pretrain").main
gc.freeze()
gc.enable()
for name in ("matplotlib", "matplotlib.figure"):  # no curves, as without it: to draw them takes long
    sys.modules[name] = None  # type: ignore[assignment]


def go_wrong(rank, kind, rank_wanted, step_wanted, seconds=0):
    """At a step, make the loss or a gradient of one rank NaN, or let the rank sleep."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    steps = 0

    def hook(module, inputs, output):
        nonlocal steps
        name = type(module).__name__
        if not module.training or name not in ("BigBirdViTModel", "VicRegForPreTraining"):
            return
        if name == "VicRegForPreTraining" and (output.loss is None or isinstance(output.loss, FakeTensor)):
            return  # the encoder's half of a step, or a look at shapes before the first one
        if rank == rank_wanted and steps == step_wanted:
            if kind == "loss" and name == "VicRegForPreTraining":
                output["loss"] = output["loss"] + float("nan")  # a constant: the gradient stays what it is
            elif kind == "gradient" and name == "BigBirdViTModel":
                output.pooler_output.register_hook(lambda gradient: gradient * float("nan"))
            elif kind == "sleep" and name == "VicRegForPreTraining":
                time.sleep(seconds)
        steps += name == "VicRegForPreTraining"

    torch.nn.modules.module.register_module_forward_hook(hook)


def run(order, rank):
    os.setpgid(0, 0)  # a signal to the group reaches this run alone
    if hasattr(os, "sched_setaffinity"):  # one core and so one thread for each: tests run side by side
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
    log = os.open(f"{order['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["world_size"] > 1:
        os.environ |= {
            "ACCELERATE_USE_CPU": "true",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(order["world_size"]),
            "LOCAL_WORLD_SIZE": str(order["world_size"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(order["port"]),
        }
    if "wrong" in order:
        go_wrong(rank, *order["wrong"])
    try:
        code = main(order["flags"])
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    os._exit(code)


for line in sys.stdin:
    order = json.loads(line)
    children = []
    for rank in range(order["world_size"]):
        child = os.fork()
        if not child:
            run(order, rank)
        children.append(child)
    print(json.dumps(children), flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)
