"""Processes of one command on this machine: `hf-vicreg pretrain --num_processes N`, without a launcher."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from hf_vicreg.training.launch.signals import PARENT

SECONDS_BETWEEN_LOOKS = 0.1
GRACE_SECONDS = 30.0  # for the others, once one process has failed: they may wait for it for ever


def run_processes(
    arguments: list[str],
    count: int,
    module: str = "hf_vicreg.training.pretrain",
    *,
    stdout: int | None = None,
) -> int:
    """Run a command in processes of its own and return the exit code of the first one that failed, else 0.

    SIGTERM and SIGINT are passed on: the processes agree on a step, write a checkpoint and leave. Whatever is still
    there when this ends, loader processes among it, is killed.

    Args:
        arguments: The same for every process; they name the folder to write to.
        count: How many; a single one is a run without others.
        module: What `python -m` runs; default: `hf-vicreg pretrain`.
        stdout: Where what they print goes, as `subprocess` has it; default: where this process prints.
    """
    shared = {PARENT: str(os.getpid())}
    if count > 1:
        shared |= _meeting_place(count)
    command = [sys.executable, "-m", module, *arguments]
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)  # not if it has ended

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            environment = os.environ | shared | own
            # a group of its own: Ctrl-C at a terminal reaches it once, from here
            processes.append(subprocess.Popen(command, env=environment, stdout=stdout, start_new_session=True))
        return _wait(processes)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _meeting_place(count: int) -> dict[str, str]:
    """Return what tells processes how many they are and where they find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return shared | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # a run sets its threads itself


def _wait(processes: list[subprocess.Popen]) -> int:
    """Wait for all, or for a while after one has failed; return that one's exit code, 128 + number for a signal."""
    code, deadline = 0, float("inf")
    # a list: each has to be asked, or its exit code is not known
    while None in [process.poll() for process in processes] and time.monotonic() < deadline:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        failed = next((process.returncode for process in processes if process.returncode), 0)
        if failed and not code:
            code, deadline = failed, time.monotonic() + GRACE_SECONDS
    code = code or next((process.returncode for process in processes if process.returncode), 0)
    return 128 - code if code < 0 else code
