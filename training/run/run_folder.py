"""The folder that a run, or a fine-tuning, writes to: whose it is, and how it is begun."""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_vicreg.training.errors import InputError, room_in

if TYPE_CHECKING:
    from accelerate import Accelerator

RECIPE = "recipe.yaml"  # by which the folder of a pretraining run is known again


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
