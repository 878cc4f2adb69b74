"""Where the processes of a run meet before they are connected, so that bad input of one ends them all.

Settings and images are read before there is a group of processes to talk in. A process that ends there would be waited
for by those of other machines, whose launchers do not know of it, for half an hour. So each says in the launcher's
store that it has come, or why it has not.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from hf_vicreg.training.errors import InputError, RelayedError, tell

PATIENCE_S = 1800.0  # torch's own for connecting
GRACE_S = 30.0  # how long one that ends lets the others come to hear of it
SECONDS_BETWEEN_LOOKS = 0.05
PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables that tell where and how many
COME, KNOWING, REFUSED, SAID_BY_FIRST = "come", "knowing", "refused", "said by the first"

_kept: dict[str, Any] = {}  # the store, which the first process may serve, and whether all met or this one ends


def meet() -> None:
    """Wait until every process has come; before they are connected. After that they have other ways to talk.

    Raises:
        RelayedError: One of them ended with bad input: what it said, and which it was. To be passed to `end_with`.
    """
    if not _of_several() or "met" in _kept:
        return
    try:
        store = _store(PATIENCE_S)
        store.add(COME, 1)
        if not _wait(
            lambda: store.add(COME, 0) >= _number("WORLD_SIZE") or store.check([REFUSED]),
            time.monotonic() + PATIENCE_S,
        ):
            raise RelayedError(f"not all {_number('WORLD_SIZE')} processes have come within {PATIENCE_S:.0f} s.")
        reason = store.get(REFUSED).decode() if store.check([REFUSED]) else None
    except RuntimeError as error:
        raise RelayedError("the first process ended before all had come; what it printed says why.") from error
    if reason is not None:
        raise RelayedError(reason)
    _kept["met"] = True


def end_with(error: InputError) -> int:
    """Print an error on its line, once over all processes, and have them all end; return the exit code, 2."""
    refuse(error, tell)
    return 2


def refuse(error: InputError, say: Callable[[InputError], object] = lambda error: None) -> None:
    """Let the others know of an error that this process ends with, own or heard of, and wait a while until all know.

    Where there are no others, or all have met, it is only said.

    Args:
        error: It.
        say: Called with it, unless the first process ends with the same; before any other process ends, because a
            launcher kills the rest of its machine then.
    """
    if not _of_several() or "met" in _kept:
        say(error)
        return
    deadline = time.monotonic() + GRACE_S
    is_first, is_own = _number("RANK") == 0, not isinstance(error, RelayedError)
    if is_first:
        say(error)
    store = said_by_first = None
    with contextlib.suppress(RuntimeError):  # there is nobody to tell, or no longer
        store = _store(GRACE_S)
        if is_own:
            store.compare_set(REFUSED, "", f"{error} (Process {_number('RANK')}, on {socket.gethostname()}.)")
        if is_first:
            store.set(SAID_BY_FIRST, str(error))
        elif is_own and _wait(lambda: store.check([SAID_BY_FIRST]), deadline):
            said_by_first = store.get(SAID_BY_FIRST).decode()
    if not is_first and said_by_first != str(error):
        say(error)
    with contextlib.suppress(RuntimeError):  # the first process or its launcher serve the store until all know
        if store is not None:
            store.add(KNOWING, 1)
            _wait(lambda: store.add(KNOWING, 0) >= _number("WORLD_SIZE"), deadline)
    _kept["met"] = True


def _wait(until: Callable[[], bool], deadline: float) -> bool:
    """Return whether it came true before the deadline."""
    while not until():
        if time.monotonic() > deadline:
            return False
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return True


def _store(patience_s: float) -> Any:
    if "store" not in _kept:
        from torch.distributed import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        served, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=patience_s))))
        _kept["store"] = PrefixStore("hf_vicreg", served)
    return _kept["store"]


def _of_several() -> bool:
    return all(name in os.environ for name in PLACE) and _number("WORLD_SIZE") > 1


def _number(name: str) -> int:
    return int(os.environ[name])
