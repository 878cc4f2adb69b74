"""The runs of a comparison, one after another, each a process of its own; what is finished is not repeated."""

import json
import logging
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hf_vicreg.comparison.table import figures_of, summary_of, to_markdown
from hf_vicreg.model_cards.schema import FileError, check_results, read_checked
from hf_vicreg.training.errors import InputError, room_in
from hf_vicreg.training.launch.signals import STOP_EXIT_CODE
from hf_vicreg.training.launch.spawn import run_processes
from hf_vicreg.training.planner.schedule import words
from hf_vicreg.training.run.run_folder import RECIPE, read_record, refuse_others

logger = logging.getLogger(__name__)

# when asked; or killed by the same signals before it listened to them
STOPPED = (STOP_EXIT_CODE, 128 + signal.SIGINT, 128 + signal.SIGTERM)
FILE, TABLE, PICTURE = "comparison.json", "comparison.md", "comparison.png"

Plan = Callable[[dict[str, Any], Path], "dict[str, Any] | int"]
Train = Callable[[list[str]], int]


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


def compare(asked: dict[str, Any], folder: Path, *, plan: Plan = planned_apart, train: Train = trained_apart) -> int:
    """Plan and train what is not there yet, and write, draw and print the table; return the exit code.

    Args:
        asked: Of `asked_for`.
        folder: Of the comparison.
        plan: Makes the plans, before anything is written, or returns an exit code.
        train: Trains with the flags of `hf-vicreg pretrain`, and returns an exit code.

    Returns:
        0: all runs are finished. 1: some failed; the others are in the table. Else that of a plan that failed, or of a
        run that was stopped.

    Raises:
        InputError: The folder holds something else, or a comparison of other settings.
    """
    asked = json.loads(json.dumps(asked))
    record = _record_in(folder, asked)
    if record is None:
        plans = plan(asked, folder)
        if isinstance(plans, int):
            return plans
        record = {"asked": asked, "plans": plans, "failed": {}}
        with room_in(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _store(folder, record)
    pairs = [(name, seed) for seed in asked["seeds"] for name in asked["settings"]]  # each has its turn early
    for number, (name, seed) in enumerate(pairs, start=1):
        run = folder / f"{name}-seed{seed}"
        if _finished(run):
            continue
        recipe = folder / f"{name}.yaml"
        with room_in(folder):
            _write(recipe, yaml.safe_dump(record["plans"][name]["recipe"], sort_keys=False))
        seconds = words(asked["seconds"])
        logger.info("\nrun %d of %d: %s, seed %d, %s of training, in %s", number, len(pairs), name, seed, seconds, run)
        flags = ["--config", str(recipe), "--output_dir", str(run), "--seed", str(seed)]
        code = train(flags + (["--resume_from_checkpoint", "latest"] if (run / RECIPE).exists() else []))
        if code in STOPPED:
            logger.warning("stopped; the same command goes on")
            return code
        record["failed"].pop(run.name, None)
        if code or not _finished(run):
            record["failed"][run.name] = code
            logger.warning("%s failed with exit code %d; the others go on", run.name, code)
    return _finish(folder, record)


def _finish(folder: Path, record: dict[str, Any]) -> int:
    """Write, draw and print what there is; return the exit code."""
    from hf_vicreg.comparison.picture import draw

    asked = record["asked"]
    record["runs"] = [
        {"objective": name, "seed": seed, "folder": f"{name}-seed{seed}"} | figures_of(results, record["plans"][name])
        for name in asked["settings"]
        for seed in asked["seeds"]
        if (results := _finished(folder / f"{name}-seed{seed}"))
    ]
    record["table"] = summary_of(record["runs"])
    text = to_markdown(record)
    with room_in(folder):
        _store(folder, record)
        _write(folder / TABLE, text)
        if record["runs"]:
            draw(record, folder / PICTURE)
    print(
        f"{text}\n{folder / FILE}, {TABLE} and {PICTURE} have it; each run's log is in its own folder. To look at one:"
    )
    for one in record["runs"][:1]:
        print(f"  hf-vicreg report {shlex.quote(str(folder / one['folder']))}")
    return 1 if record["failed"] else 0


def _record_in(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the folder says of its comparison; None if it is new or empty.

    Raises:
        InputError: Something else, or another comparison.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"`output_dir`: expected a folder, got {folder}, which is a file.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    record = read_record("output_dir", folder / FILE)
    remedy = "choose another folder"
    if not {"asked", "plans", "failed"} <= record.keys() or not isinstance(record["asked"], dict):
        raise InputError(f"`output_dir`: expected a comparison in {folder / FILE}, found something else; {remedy}.")
    refuse_others("output_dir", folder, record["asked"], asked, remedy)
    plans = record["plans"]
    if record["asked"] != asked or not isinstance(plans, dict) or plans.keys() != asked["settings"].keys():
        raise InputError(f"`output_dir`: expected the comparison that is asked for in {folder}, found more; {remedy}.")
    return record


def _finished(run: Path) -> dict[str, Any]:
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


def _store(folder: Path, record: dict[str, Any]) -> None:
    _write(folder / FILE, json.dumps(record, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file whole, or what was there stays."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
