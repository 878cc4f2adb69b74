"""What asks a run to stop: SIGTERM, SIGINT, a file, a time limit, or a launcher that is gone.

A signal may arrive at any moment and at one process of many, so a handler only remembers it. The training loop asks
after every step, agrees with the other processes, and all of them checkpoint and leave together.
"""

import os
import signal
import threading
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType

STOP_FILE = "stop"
STOP_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
SECONDS_BETWEEN_LOOKS = 1.0  # at the stop file, which may lie on a network's file system
WORKER_GRACE_S = 600  # how long a loader process outlives a SIGTERM: a step, a measurement and a checkpoint
LAUNCHERS = (b"accelerate", b"accelerate-launch", b"torchrun")
LAUNCHER_MODULES = (b"accelerate.", b"torch.distributed.")
PARENT = "HF_VICREG_PARENT"  # environment variable: the process that started this one as one of several


class StopReason(IntEnum):
    """Why a run stops; where processes have different reasons, the largest is the one told."""

    NONE = 0
    MAX_TIME = 1
    STOP_FILE = 2
    LAUNCHER_GONE = 3
    SIGINT = 4
    SIGTERM = 5

    def __str__(self) -> str:
        texts = {"MAX_TIME": "--max_time is over", "STOP_FILE": "the stop file", "LAUNCHER_GONE": "its launcher ended"}
        return texts.get(self.name, self.name)


class StopRequest:
    """Remembers that this process was asked to stop. As a context, it handles SIGTERM and SIGINT.

    A second SIGINT ends the process at once. In a thread other than the main one signals are left alone, as Python
    demands.
    """

    def __init__(self, output_dir: Path, max_time_minutes: float | None):
        """Start the clock.

        Args:
            output_dir: The run's folder; a file named `stop` in it is a request.
            max_time_minutes: Time limit from now on; None is none.
        """
        self.file = output_dir / STOP_FILE
        self.deadline = None if max_time_minutes is None else time.monotonic() + 60 * max_time_minutes
        self.launcher = _launcher()
        self.signalled = StopReason.NONE
        self.file_seen = False
        self.next_look = 0.0
        self.previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signalled = max(self.signalled, StopReason[signal.Signals(number).name])
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the kernel's: works while the process waits for others

    def reason(self) -> StopReason:
        """Return why this process shall stop; costs nothing worth mentioning."""
        if self.signalled:
            return self.signalled
        if self.launcher is not None and os.getppid() != self.launcher:
            return StopReason.LAUNCHER_GONE
        now = time.monotonic()
        if not self.file_seen and now >= self.next_look:
            self.next_look = now + SECONDS_BETWEEN_LOOKS
            self.file_seen = self.file.exists()
        if self.file_seen:
            return StopReason.STOP_FILE
        return StopReason.MAX_TIME if self.deadline is not None and now >= self.deadline else StopReason.NONE

    def fulfilled(self) -> None:
        """Remove the stop file: it asked this launch, not the next one."""
        self.file.unlink(missing_ok=True)


def stop_exit_code() -> int:
    """Return the exit code of a run that stopped when asked.

    An elastic launcher starts a failed process again and takes every code but 0 for a failure.
    """
    return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 else STOP_EXIT_CODE


def outlive_signals(worker_id: int) -> None:
    """Let a loader process outlive signals sent to the whole group, as a terminal or SLURM does; a `worker_init_fn`.

    The main process needs it for the step it is at, and ends it afterwards. The time limit is for the case that the
    main process waits for it to end by SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def end_workers(iterator: object) -> None:
    """End the processes of a loader's iterator that is left early, if it has any.

    Otherwise they are ended when the interpreter exits, by the very signal that they outlive. torch does the same when
    the iterator is deleted, but an exception on its way keeps it alive.
    """
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.alarm(WORKER_GRACE_S)


def _launcher() -> int | None:
    """Return the process id of the launcher that started this process, None if there is none or it cannot be told.

    `accelerate launch` of one process ends on a signal without passing it on, and its child would train on unseen.
    """
    if PARENT in os.environ:  # it may be gone by now
        return int(os.environ[PARENT])
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return None
    words = command.split(b"\0")[:4]  # an interpreter, its options, and what it runs
    named = any(os.path.basename(word) in LAUNCHERS or word.startswith(LAUNCHER_MODULES) for word in words)
    return parent if named else None
