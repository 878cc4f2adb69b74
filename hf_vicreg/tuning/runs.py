"""The trials of a tuning, one after another, each a process of its own; what is finished is not repeated.

The trials of a round are trained from the beginning, also those that went through rounds before. A run's learning rate
follows a cosine that ends with its steps: one that has come to its end would have to be warmed up again, and is then
not what its recipe gives. Going on from there would save a third of the steps (eight trials); anew, each round
compares whole runs, and what it says of a recipe is what the recipe does.
"""

import json
import logging
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hf_vicreg.comparison.trials import (
    STOPPED,
    finished,
    flags_of,
    judged_apart,
    planned_apart,
    record_in,
    trained_apart,
    write,
)
from hf_vicreg.training.errors import InputError, room_in
from hf_vicreg.training.objectives.registry import entry_of
from hf_vicreg.training.planner.ladder import used_side
from hf_vicreg.training.planner.schedule import words
from hf_vicreg.training.run.section_flags import VICREG
from hf_vicreg.tuning.command import with_values
from hf_vicreg.tuning.halving import Range, best_of, counts_of, drawn, steps_for
from hf_vicreg.tuning.table import to_markdown, value_of_judge

logger = logging.getLogger(__name__)

FILE, TABLE, BASE, TUNED = "tuning.json", "tuning.md", "base.yaml", "tuned.yaml"
WITHOUT_LABELS = "rankme"
CROP, CROPS = "views.crop_min_ratio", (0.05, 0.8)  # of the image's area
FACTOR = 5.0  # up and down, of numbers without a range of their own
# of a recipe; those of a trial, not of what is tuned
OF_LENGTH = ("max_steps", "num_train_epochs", "checkpointing_steps", "knn_every_epochs", "linear_probe")

Plan = Callable[[dict[str, Any], Path], "dict[str, Any] | int"]
Train = Callable[[list[str]], int]
Judge = Callable[[Path, Path], "dict[str, float] | int"]


def tune(
    asked: dict[str, Any],
    folder: Path,
    *,
    plan: Plan = planned_apart,
    train: Train = trained_apart,
    judge: Judge = judged_apart,
) -> int:
    """Plan, train and judge what is not there yet, write the best one's recipe, print the table; return the exit code.

    Args:
        asked: Of `asked_for`.
        folder: Of the tuning.
        plan: Makes the plan, before anything is written, or returns an exit code.
        train: Trains with the flags of `hf-vicreg pretrain`, and returns an exit code.
        judge: Returns the figures of `label_free_figures`, of views of a recipe and the encoder in a run's folder.

    Returns:
        0: there is a recipe. 1: all runs failed. Else that of a plan that failed, or of a run that was stopped.

    Raises:
        InputError: The folder holds something else, or a tuning of other settings; too little time; no labels to judge
            by; or a number that cannot be tuned.
    """
    asked = json.loads(json.dumps(asked))
    counts = counts_of(asked["trials"])
    record = record_in(folder, FILE, asked, "tuning", {"plan", "space", "trials", "rounds", "spent", "judge"})
    if record is None:
        began = time.monotonic()
        plans = plan(asked | {"seconds": asked["seconds"] / len(counts) / counts[-1]}, folder)  # the longest trials
        if isinstance(plans, int):
            return plans
        record = _begun(asked, next(iter(plans.values())), time.monotonic() - began)
        with room_in(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / BASE, yaml.safe_dump(record["plan"]["recipe"], sort_keys=False))
            _store(folder, record)
    for one in record["rounds"][-1:]:  # what failed in the round that is not over is tried again
        one["figures"] = {number: found for number, found in one["figures"].items() if found}
    for level in range(len(counts)):
        if level == len(record["rounds"]):
            members = list(range(counts[0])) if not level else best_of(_scores(record, -1), counts[level])
            if len(members) < 2:
                break
            record["rounds"].append({"steps": _steps(record, level, members), "members": members, "figures": {}})
        code = _round(folder, record, level, train, judge)
        if code:
            return code
    return _finish(folder, record)


def _begun(asked: dict[str, Any], plan: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the record of a tuning that begins: what is drawn, from where."""
    if asked["judge"] == "knn" and not plan["labelled"]:
        raise InputError(
            "`judge`: expected one that needs no labels, as there are none for training and held-out images, got "
            f"'knn'; take {WITHOUT_LABELS}."
        )
    judge = asked["judge"] if asked["judge"] != "auto" else "knn" if plan["labelled"] else WITHOUT_LABELS
    space, first = space_of(asked, plan["recipe"])
    record: dict[str, Any] = {"asked": asked, "plan": plan, "space": space, "judge": judge, "rounds": [], "failed": {}}
    record |= {"spent": seconds, "measured": {"trials": 0, "steps": 0, "training_seconds": 0.0, "seconds": 0.0}}
    record["trials"] = drawn(
        {key: (low, high) for key, (low, high) in space.items()}, first, asked["trials"], asked["seed"]
    )
    counts, per_epoch = counts_of(asked["trials"]), plan["steps_per_epoch"]
    if _steps(record, 0, list(range(counts[0])), least=0) < per_epoch:
        needed = seconds + len(counts) * counts[0] * (seconds + per_epoch * plan["step_seconds"])
        raise InputError(
            f"`time_budget`: expected time for one pass over the images in each of {counts[0]} trials at least, "
            f"{words(needed)}, got {words(asked['seconds'])}; raise it, or lower --trials."
        )
    return record


def space_of(asked: dict[str, Any], recipe: dict[str, Any]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the ends of each number that is tuned, and what a recipe has for it.

    Raises:
        InputError: The recipe has no number there, or one of 0 without ends being given.
    """
    ranges: dict[str, Range | None] = {key: (low, high) for key, (low, high) in asked["search"].items()}
    if not ranges:
        ranges = {"learning_rate": None, CROP: CROPS, **entry_of(recipe).tuned}
    space, first = {}, {}
    for key, ends in ranges.items():
        section, _, name = key.rpartition(".")
        found = recipe.get(section) or {} if section else recipe
        value = found.get(name, VICREG[name].default if section == "vicreg" and name in VICREG else None)
        if isinstance(value, bool) or not isinstance(value, int | float) or (ends is None and not value > 0):
            raise InputError(f"`search`: expected a number for {key} in the recipe, got {value!r}; leave it out.")
        first[key] = float(value)
        space[key] = list(ends) if ends else [float(f"{value / FACTOR:.3g}"), float(f"{value * FACTOR:.3g}")]
    return space, first


def _steps(record: dict[str, Any], level: int, members: list[int], least: int | None = None) -> int:
    """Return the steps of a round: what is left of the time, shared out, by what the trials before it took."""
    plan, measured, rounds = record["plan"], record["measured"], record["rounds"]
    step, other = plan["step_seconds"], record["spent"]  # a plan starts Python, reads images and tries a few steps
    if measured["trials"]:
        step = measured["training_seconds"] / measured["steps"]
        other = (measured["seconds"] - measured["training_seconds"]) / measured["trials"]
    if least is None:
        least = rounds[level - 1]["steps"] if level else plan["steps_per_epoch"]
    counts = [len(members), *counts_of(record["asked"]["trials"])[level + 1 :]]
    left = record["asked"]["seconds"] - record["spent"]
    return steps_for(left, counts, step_seconds=step, other_seconds=other, least=least)


def _round(folder: Path, record: dict[str, Any], level: int, train: Train, judge: Judge) -> int:
    """Train and judge what is not yet of a round; return an exit code if it was stopped, else 0."""
    one = record["rounds"][level]
    for number in one["members"]:
        if str(number) in one["figures"]:
            continue
        run = folder / f"trial{number:02d}-round{level + 1}"
        recipe = run.with_suffix(".yaml")
        settings = with_trial(record, number) | {"max_steps": one["steps"]}
        shown = ", ".join(f"{key} {value:g}" for key, value in record["trials"][number].items())
        logger.info("\nround %d, trial %d: %d steps with %s", level + 1, number, one["steps"], shown)
        with room_in(folder):
            write(recipe, yaml.safe_dump(settings, sort_keys=False))
            _store(folder, record)
        began, is_new = time.monotonic(), not run.exists()
        code = 0 if finished(run) else train(flags_of(recipe, run, record["asked"]["seed"]))
        figures = {} if code or not finished(run) else _judged(folder, record, run, judge)
        taken = time.monotonic() - began
        record["spent"] += taken
        stopped = next((found for found in (code, figures) if isinstance(found, int) and found in STOPPED), 0)
        if stopped:
            with room_in(folder):
                _store(folder, record)
            logger.warning("stopped; the same command goes on")
            return stopped
        if not isinstance(figures, dict) or not figures:
            record["failed"][run.name] = code or figures or 1
            logger.warning("%s failed with exit code %s; the others go on", run.name, record["failed"][run.name])
        else:
            record["failed"].pop(run.name, None)
        if is_new and isinstance(figures, dict) and figures:
            results, measured = finished(run), record["measured"]
            found = {"trials": 1, "steps": results["steps"], "training_seconds": results["training_seconds"]}
            record["measured"] = {key: measured[key] + value for key, value in (found | {"seconds": taken}).items()}
        one["figures"][str(number)] = figures if isinstance(figures, dict) else {}
        with room_in(folder):
            _store(folder, record)
    return 0


def with_trial(record: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the plan's recipe with a trial's numbers; other crops have another size of use, if the plan chose it."""
    settings = with_values(record["plan"]["recipe"], record["trials"][number])
    if record["plan"].get("chooses_used_size") and CROP in record["trials"][number]:
        views, model = settings["views"], settings["model"]
        stride = model.get("patch_stride") or model["patch_size"]
        used = used_side(views["image_size"], views["crop_min_ratio"], stride)
        settings["model"] = model | {"image_size": used}
    return settings


def _judged(folder: Path, record: dict[str, Any], run: Path, judge: Judge) -> dict[str, float] | int:
    """Return what a finished run is worth: its k-NN, or the figures without labels."""
    if record["judge"] == "knn":
        accuracy = (finished(run).get("knn_accuracy") or {}).get("trained")
        return {} if accuracy is None else {"knn": accuracy}
    return judge(folder / BASE, run)


def _scores(record: dict[str, Any], level: int) -> dict[int, float]:
    """Return the scores of a round by trial, more is better; NaN of those that failed."""
    found = record["rounds"][level]["figures"]
    return {int(number): value_of_judge(figures, record["judge"]) for number, figures in found.items()}


def _finish(folder: Path, record: dict[str, Any]) -> int:
    """Write and print what was found; return the exit code."""
    rounds = [best_of(_scores(record, level), 1) for level in range(len(record["rounds"]))]
    best = next((found[0] for found in reversed(rounds) if found), None)
    record["best"] = best
    text = to_markdown(record)
    with room_in(folder):
        _store(folder, record)
        write(folder / TABLE, text)
        if best is not None:
            recipe = with_trial(record, best)
            kept = {key: one for key, one in recipe.items() if key not in OF_LENGTH and one is not None}
            write(folder / TUNED, yaml.safe_dump(kept, sort_keys=False))
    print(text)
    if best is None:
        return 1
    tuned = shlex.quote(str(folder / TUNED))
    print(f"{tuned} is the recipe of trial {best}. To train with it:")
    print(f"  hf-vicreg pretrain --config {tuned} --time_budget 3h --output_dir runs/tuned")
    return 0


def _store(folder: Path, record: dict[str, Any]) -> None:
    write(folder / FILE, json.dumps(record, indent=1) + "\n")


__all__ = ["space_of", "tune", "with_trial"]
