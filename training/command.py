"""`hf-vicreg pretrain`: what can be refused is refused before torch is imported."""

import logging
import os
from collections.abc import Callable
from typing import Any

from hf_vicreg.training.errors import InputError, RunStopped, tell
from hf_vicreg.training.flags import parse_flags
from hf_vicreg.training.places import with_places
from hf_vicreg.training.settings import explicit_settings


def main(arguments: list[str], run: Callable[[dict[str, Any]], Any] | None = None) -> int:
    """Run from the command line; return the exit code: 2 for bad input, 75 for a run that stopped when asked.

    Args:
        arguments: Flags.
        run: What to do with the settings; default: `training.pretrain.run_settings`, imported when they are good.
    """
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hf_vicreg").setLevel(logging.INFO if main_process else logging.ERROR)
    try:
        settings = with_places(explicit_settings(parse_flags(arguments)))
        return _run(settings, run)
    except InputError as error:
        tell(error)
        return 2


def _run(settings: dict[str, Any], run: Callable[[dict[str, Any]], Any] | None) -> int:
    from hf_vicreg.training.distributed import leave_processes
    from hf_vicreg.training.signals import stop_exit_code

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
