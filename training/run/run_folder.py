"""The folder that a run, or a fine-tuning, writes to: whose it is, and how it is begun."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_vicreg.training.errors import InputError, room_in

if TYPE_CHECKING:
    from accelerate import Accelerator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"  # by which the folder of a pretraining run is known again
PATIENCE_S = 10.0  # for a run that was killed, whose processes end a little later
_held: set[int] = set()  # file descriptors of folders; a loader process that is forked off shall not hold them, too


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def begun_sizes(folder: Path) -> dict[str, Any]:
    """Return the image sizes in the recipe of a run's folder, by section: of `views` and of use, `model`."""
    try:
        recipe = yaml.safe_load((folder / RECIPE).read_text())
    except (OSError, ValueError, yaml.YAMLError):  # whoever reads the whole recipe says what is wrong with it
        return {}
    sections = {key: recipe.get(key) or {} for key in ("views", "model")} if isinstance(recipe, dict) else {}
    sizes = {key: one.get("image_size") for key, one in sections.items() if isinstance(one, dict)}
    sizes["views"] = sizes.get("views") or sizes.get("model")
    return {key: size for key, size in sizes.items() if size is not None}


def refuse_foreign_folder(folder: Path, own_file: str, *, resuming: bool) -> None:
    """Raise InputError for a folder that is neither new nor empty nor, with `resuming`, one that holds `own_file`."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"`output_dir`: expected a folder, got {folder}, which is a file.")
    present = {path.name for path in folder.iterdir()} - {_unfinished(own_file)} if folder.is_dir() else set()
    if present and not resuming:
        remedy = "add --resume_from_checkpoint latest to continue it, or" if own_file in present else "please"
        raise InputError(f"`output_dir`: expected a new or empty folder, {folder} is not; {remedy} choose another.")
    if present and own_file not in present:
        raise InputError(f"`output_dir`: expected the folder of a run to resume, {folder} holds something else.")


def file_inside(run: Path, *parts: str) -> Path:
    """Return a file of a run, or raise InputError if it is a link that leads out of its folder."""
    path = run.joinpath(*parts)
    if not path.resolve().is_relative_to(run.resolve()):
        raise InputError(f"`{path.relative_to(run)}`: expected a file of {run}, got a link out of it; copy it there.")
    return path


@contextlib.contextmanager
def alone_in(folder: Path, accelerator: "Accelerator") -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be; every process must enter, and the main one holds it.

    The system lets go of it when the process ends, however it does. File systems without locks keep nobody out.

    Raises:
        InputError: Another run is in it, and stays.
    """
    from hf_vicreg.training.launch.distributed import run_on_main  # imports torch

    descriptors: list[int] = []

    def hold() -> None:
        with contextlib.suppress(OSError):  # who writes there says what is wrong with it
            folder.mkdir(parents=True, exist_ok=True)
            descriptors.append(os.open(folder, os.O_RDONLY))
        for one in descriptors:
            _held.add(one)
            _lock(one, folder)

    try:
        run_on_main(hold, accelerator)
        yield
    finally:
        for one in descriptors:
            _held.discard(one)
            os.close(one)


def _lock(descriptor: int, folder: Path) -> None:
    until, said = time.monotonic() + PATIENCE_S, False
    while fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise InputError(
                    f"`output_dir`: expected a folder that no run is writing to, another one is in {folder}; wait for "
                    "its end or choose another folder. Several processes of one run need a launcher (torchrun, "
                    "accelerate launch or --num_processes)."
                ) from None
            if not said:
                logger.info("waiting for another run to leave %s", folder)
            said = True
            time.sleep(0.2)
        except OSError:  # no locks there
            break


def start_folder(folder: Path, own_file: str, text: str, accelerator: "Accelerator") -> None:
    """Make a folder if need be, and write into it what the run is made of; every process must call.

    Args:
        folder: The run's.
        own_file: Name of the file by which it is known again; it is written whole, or what was there stays.
        text: What it holds.
        accelerator: The run's processes.

    Raises:
        InputError: No room, or nothing can be written there.
    """

    from hf_vicreg.training.launch.distributed import run_on_main  # imports torch, and the check above is made without

    def start() -> None:
        temporary = folder / _unfinished(own_file)
        try:
            with room_in(folder):
                folder.mkdir(parents=True, exist_ok=True)
                temporary.write_text(text)
                temporary.replace(folder / own_file)
        except OSError as error:
            raise InputError(f"`output_dir`: expected a folder to write to, {folder} is not: {error}.") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    run_on_main(start, accelerator)


def _unfinished(own_file: str) -> str:
    return f"{own_file}.tmp"


def read_record(field: str, path: Path) -> dict[str, Any]:
    """Return what a folder says in a JSON file of how it was made.

    Args:
        field: What the user gave.
        path: The file.

    Raises:
        InputError: None there.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(
            f"`{field}`: expected a new folder or one with {path.name}, {path.parent} holds something else; choose "
            "another folder."
        )
    return found


def refuse_others(field: str, folder: Path, found: dict[str, Any], expected: dict[str, Any], remedy: str) -> None:
    """Compare what a folder was made of with what is asked for; fields of `found` alone are passed over.

    Raises:
        InputError: They differ; it names the first field that does.
    """
    for key, wanted in expected.items():
        if isinstance(wanted, dict) and isinstance(found.get(key), dict):
            refuse_others(field, folder, found[key], wanted, remedy)
        elif found.get(key) != wanted:
            raise InputError(
                f"`{field}`: expected `{key}` {wanted!r} in {folder}, found {found.get(key)!r}: of another model, "
                f"other images or other flags; {remedy}."
            )
