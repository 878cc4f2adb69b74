"""`hf-vicreg pretrain`: what can be refused is refused before torch is imported."""

import os
from collections.abc import Callable
from typing import Any

from hf_vicreg.training.errors import InputError, RunStopped, log_to_stderr, memory_to_hold
from hf_vicreg.training.launch.meeting import end_with
from hf_vicreg.training.run.flags import parse_flags
from hf_vicreg.training.run.places import with_places
from hf_vicreg.training.run.settings import explicit_settings

MAX_PROCESSES = 64  # against slips


def main(arguments: list[str], run: Callable[[dict[str, Any]], Any] | None = None) -> int:
    """Run from the command line; return the exit code: 2 for bad input, 75 for a run that stopped when asked.

    With `--num_processes` it starts so many others and waits for them.

    Args:
        arguments: Flags.
        run: What to do with the settings; default: `training.pretrain.run_settings`, imported when they are good.
    """
    log_to_stderr()
    try:
        given = parse_flags(arguments)
        count = checked_count(given.pop("num_processes", None))
        settings = with_places(explicit_settings(given))
        if count == 1:
            with memory_to_hold():
                return _run(settings, run)
        from hf_vicreg.training.launch.spawn import run_processes

        return run_processes([*_without_count(arguments), "--output_dir", settings["output_dir"]], count)
    except InputError as error:
        return end_with(error)


def checked_count(count: int | None) -> int:
    """Return how many processes this one shall start; 1: it is the run itself.

    Args:
        count: `--num_processes`; None if it was not given.

    Raises:
        InputError: A number out of range, or a launcher that has started them.
    """
    if count is None:
        return 1
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("`num_processes`: expected none under a launcher, which has started them; leave it out.")
    if not 1 <= count <= MAX_PROCESSES:
        raise InputError(f"`num_processes`: expected 1 to {MAX_PROCESSES}, got {count}.")
    return count


def _without_count(arguments: list[str]) -> list[str]:
    """Return the flags without `--num_processes`, in either of its forms."""
    return [
        one
        for before, one in zip(["", *arguments], arguments, strict=False)
        if "--num_processes" not in (before, one.partition("=")[0])
    ]


def _run(settings: dict[str, Any], run: Callable[[dict[str, Any]], Any] | None) -> int:
    from hf_vicreg.training.launch.distributed import leave_processes
    from hf_vicreg.training.launch.signals import stop_exit_code

    try:
        if run is None:
            from hf_vicreg.training.pretrain import run_settings

            run_settings(settings)
        else:
            run(settings)
    except RunStopped:
        return stop_exit_code()
    finally:
        leave_processes()
    return 0
