"""Imports the package once, and forks the processes of a launcher from that for each order it reads.

To start Python anew for each process takes more time than most of what is tested in it; the launchers themselves have
tests of their own. An order is a line of JSON on standard input: `world_size`, `program` (as after `python`), `folder`
to work in and `log`, the start of file names that the rank and `out` or `err` follow. The answer is a line of exit
codes. Each process has the environment that `torchrun` gives; the first one that fails ends the others. With
`machines` they are shared out over so many, a failure ends those of its machine alone, and all keep to one core, so
that the number of threads does not hang on that of machines.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback

gc.disable()  # what is imported stays: to look through it for garbage takes a fifth of the time
importlib.import_module("hf_vicreg.training.pretrain")  # for all of them
gc.freeze()
gc.enable()
for name in ("matplotlib", "matplotlib.figure"):  # no curves, as without it: to draw them takes long
    sys.modules[name] = None  # type: ignore[assignment]


def run(order, rank, port):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{order['log']}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.chdir(order["folder"])
    count, local = order["world_size"], order["world_size"] // (order["machines"] or 1)
    if order["machines"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local)}
    program, code = order["program"], 0
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def obey(order):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children, local = {}, order["world_size"] // (order["machines"] or 1)
    for rank in range(order["world_size"]):
        child = os.fork()
        if not child:
            run(order, rank, port)
        children[child] = rank
    codes = {}
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        code = codes[rank] = os.waitstatus_to_exitcode(status)
        if code:
            for other, its_rank in children.items():
                if its_rank // local == rank // local:
                    os.kill(other, signal.SIGTERM)
    return [codes[rank] for rank in range(order["world_size"])]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line))), flush=True)
