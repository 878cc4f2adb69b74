"""Imports the package once, and forks the processes of a launcher from that for each order it reads.

To start Python anew for each process takes more time than most of what is tested in it; the launchers themselves have
tests of their own. An order is a line of JSON on standard input: `world_size`, `program` (as after `python`), `folder`
to work in and `log`, the start of file names that the rank and `out` or `err` follow. The answer is a line of exit
codes. Each process has the environment that `torchrun` gives; the first one that fails ends the others.
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
    count = str(order["world_size"])
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
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
    children = {}
    for rank in range(order["world_size"]):
        child = os.fork()
        if not child:
            run(order, rank, port)
        children[child] = rank
    codes = {}
    while children:
        child, status = os.wait()
        code = codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
        if code:
            for other in children:
                os.kill(other, signal.SIGTERM)
    return [codes[rank] for rank in range(order["world_size"])]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line))), flush=True)
