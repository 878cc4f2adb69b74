"""What commands share that train several runs, one after another: processes of their own, and what is on the disk."""

import json
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hf_vicreg.model_cards.schema import FileError, check_results, read_checked
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.launch.signals import STOP_EXIT_CODE
from hf_vicreg.training.launch.spawn import run_processes
from hf_vicreg.training.run.run_folder import RECIPE, read_record, refuse_others

# when asked; or killed by the same signals before it listened to them
STOPPED = (STOP_EXIT_CODE, 128 + signal.SIGINT, 128 + signal.SIGTERM)
LABEL_FREE = "label_free.json"  # in a run's folder


def planned_apart(asked: dict[str, Any], folder: Path) -> dict[str, Any] | int:
    """Return the plans, made by a process that is gone afterwards, or the exit code of one that had none to give."""
    with tempfile.TemporaryDirectory() as place:
        given, found = (Path(place) / name for name in ("asked.json", "plans.json"))
        given.write_text(json.dumps({"asked": asked, "folder": str(folder)}))
        code = run_processes([str(given), str(found)], 1, "hf_vicreg.comparison.planning", stdout=subprocess.DEVNULL)
        return code or json.loads(found.read_text())


def trained_apart(flags: list[str]) -> int:
    """Train in a process that is gone afterwards; return its exit code."""
    return run_processes(flags, 1, stdout=subprocess.DEVNULL)


def judged_apart(recipe: Path, run: Path) -> dict[str, float] | int:
    """Return what an encoder is worth without labels, told by a process that is gone afterwards, or its exit code.

    Args:
        recipe: Which images and views to look at.
        run: The folder of a finished run.
    """
    path = run / LABEL_FREE
    if not path.is_file():
        code = run_processes([str(recipe), str(run)], 1, "hf_vicreg.tuning.judging", stdout=subprocess.DEVNULL)
        if code:
            return code
    return json.loads(path.read_text())


def flags_of(recipe: Path, run: Path, seed: int) -> list[str]:
    """Return the flags of a run: from its recipe, or on from where it is."""
    flags = ["--config", str(recipe), "--output_dir", str(run), "--seed", str(seed)]
    return flags + (["--resume_from_checkpoint", "latest"] if (run / RECIPE).exists() else [])


def record_in(folder: Path, file: str, asked: dict[str, Any], what: str, keys: set[str]) -> dict[str, Any] | None:
    """Return what a folder says of the runs in it; None if it is new or empty.

    Args:
        folder: Theirs.
        file: JSON, with what was `asked` for and the other `keys`.
        asked: What is asked for now.
        what: Such as `comparison`.
        keys: That the file has.

    Raises:
        InputError: Something else, or others that were asked for.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"`output_dir`: expected a folder, got {folder}, which is a file.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    record = read_record("output_dir", folder / file)
    remedy = "choose another folder"
    if not {"asked", *keys} <= record.keys() or not isinstance(record["asked"], dict):
        raise InputError(f"`output_dir`: expected a {what} in {folder / file}, found something else; {remedy}.")
    refuse_others("output_dir", folder, record["asked"], asked, remedy)
    if record["asked"] != asked:
        raise InputError(f"`output_dir`: expected the {what} that is asked for in {folder}, found more; {remedy}.")
    return record


def finished(run: Path) -> dict[str, Any]:
    """Return the results of a run, empty if it has not come to its end.

    Raises:
        InputError: A file of that name that holds something else.
    """
    path = run / "results.json"  # written last
    if not path.is_file():
        return {}
    try:
        results = read_checked(path, check_results)
    except FileError as error:
        raise InputError(f"`output_dir`: expected the results of a run in {path}: {error}") from None
    return results if results.keys() >= {"steps", "training_seconds"} else {}


def write(path: Path, text: str) -> None:
    """Write a file whole, or what was there stays."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
