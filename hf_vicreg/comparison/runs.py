"""The runs of a comparison, one after another, each a process of its own; what is finished is not repeated."""

import json
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hf_vicreg.comparison.table import figures_of, summary_of, to_markdown
from hf_vicreg.comparison.trials import STOPPED, finished, flags_of, planned_apart, record_in, trained_apart, write
from hf_vicreg.training.errors import InputError, room_in
from hf_vicreg.training.planner.schedule import words

logger = logging.getLogger(__name__)

FILE, TABLE, PICTURE = "comparison.json", "comparison.md", "comparison.png"

Plan = Callable[[dict[str, Any], Path], "dict[str, Any] | int"]
Train = Callable[[list[str]], int]


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
    record = record_in(folder, FILE, asked, "comparison", {"plans", "failed"})
    if record is None:
        plans = plan(asked, folder)
        if isinstance(plans, int):
            return plans
        record = {"asked": asked, "plans": plans, "failed": {}}
        with room_in(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _store(folder, record)
    if not isinstance(record["plans"], dict) or record["plans"].keys() != asked["settings"].keys():
        raise InputError(f"`output_dir`: expected a plan for each objective in {folder / FILE}; choose another.")
    pairs = [(name, seed) for seed in asked["seeds"] for name in asked["settings"]]  # each has its turn early
    for number, (name, seed) in enumerate(pairs, start=1):
        run = folder / f"{name}-seed{seed}"
        if finished(run):
            continue
        recipe = folder / f"{name}.yaml"
        with room_in(folder):
            write(recipe, yaml.safe_dump(record["plans"][name]["recipe"], sort_keys=False))
        seconds = words(asked["seconds"])
        logger.info("\nrun %d of %d: %s, seed %d, %s of training, in %s", number, len(pairs), name, seed, seconds, run)
        code = train(flags_of(recipe, run, seed))
        if code in STOPPED:
            logger.warning("stopped; the same command goes on")
            return code
        record["failed"].pop(run.name, None)
        if code or not finished(run):
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
        if (results := finished(folder / f"{name}-seed{seed}"))
    ]
    record["table"] = summary_of(record["runs"])
    text = to_markdown(record)
    with room_in(folder):
        _store(folder, record)
        write(folder / TABLE, text)
        if record["runs"]:
            draw(record, folder / PICTURE)
    print(
        f"{text}\n{folder / FILE}, {TABLE} and {PICTURE} have it; each run's log is in its own folder. To look at one:"
    )
    for one in record["runs"][:1]:
        print(f"  hf-vicreg report {shlex.quote(str(folder / one['folder']))}")
    return 1 if record["failed"] else 0


def _store(folder: Path, record: dict[str, Any]) -> None:
    write(folder / FILE, json.dumps(record, indent=1) + "\n")
