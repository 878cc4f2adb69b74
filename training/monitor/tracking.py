"""The trackers that a run's figures are sent to, through accelerate."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_vicreg.training.errors import InputError

TRACKERS = ("tensorboard", "wandb")
TRACKERS_FOLDER = "trackers"
PROJECT = "hf_vicreg"


def tracker_names(report_to: str) -> list[str]:
    """Return the trackers that `report_to` names; `all` is every one of `TRACKERS` that is installed.

    Raises:
        InputError: An unknown name, or none that is installed.
    """
    if report_to not in (*TRACKERS, "all"):
        raise InputError(f"`report_to`: expected one of {', '.join(TRACKERS)} or all, got {report_to!r}.")
    wanted = TRACKERS if report_to == "all" else (report_to,)
    found = [name for name in wanted if importlib.util.find_spec(name) is not None]
    if not found:
        missing = " or ".join(wanted)
        raise InputError(f"`report_to`: expected an installed tracker, {missing} is not; pip install {wanted[0]}.")
    return found


def start_trackers(accelerator: Accelerator, folder: Path, settings: dict[str, Any], step: int) -> None:
    """Start the accelerator's trackers, with their files in the run's folder; every process must call.

    Args:
        accelerator: Built with `log_with`; without, nothing happens.
        folder: The run's.
        settings: Nested settings of the run to store beside its figures.
        step: Steps done: TensorBoard hides what an interrupted run had drawn beyond.
    """
    if not accelerator.log_with:
        return
    (folder / TRACKERS_FOLDER).mkdir(exist_ok=True)
    accelerator.init_trackers(
        PROJECT,
        # TensorBoard would make a run of its own out of the settings; recipe.yaml has them
        config=dict(_flat(settings)) if any(str(one) == "wandb" for one in accelerator.log_with) else None,
        init_kwargs={
            "tensorboard": {"purge_step": step + 1},
            "wandb": {"dir": str(folder / TRACKERS_FOLDER), "name": folder.name},
        },
    )


def finish_trackers(accelerator: Accelerator) -> None:
    """Let the trackers write out what they hold; `Accelerator.end_training` would end the process group as well."""
    for tracker in accelerator.trackers:
        tracker.finish()


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield plain values by dotted names."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, int | float | str | bool) else str(value)
