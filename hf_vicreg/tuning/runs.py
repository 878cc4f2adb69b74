"""The trials of a tuning, one after another, each a process of its own; what is finished is not repeated.

The trials of a round are trained from the beginning, also those that went through rounds before. A run's learning rate
follows a cosine that ends with its steps: one that has come to its end would have to be warmed up again, and is then
not what its recipe gives. Going on from there would save a third of the steps (eight trials); anew, each round
compares whole runs, and what it says of a recipe is what the recipe does.
"""

import json
import logging
import shlex
import signal
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
from hf_vicreg.tuning.halving import Range, best_of, counts_of, drawn
from hf_vicreg.tuning.rounds import is_over, is_whole, judged_rounds, next_round, next_steps, scores_of
from hf_vicreg.tuning.table import to_markdown

logger = logging.getLogger(__name__)

FILE, TABLE, BASE, TUNED = "tuning.json", "tuning.md", "base.yaml", "tuned.yaml"
WITHOUT_LABELS = "rankme"
KILLED = 128 + signal.SIGKILL  # by the system, for want of memory
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
    if killed := record.pop("under_way", None):
        record["spent"] += _seen_alive(folder / killed)
    rounds = record["rounds"]
    for one in rounds[-1:] if not is_over(record) else []:  # what failed in the last round is tried again
        one["figures"] = {number: found for number, found in one["figures"].items() if found}
    record["cut_off"] = False
    while not record["cut_off"]:
        if not rounds or is_whole(rounds[-1]):
            following = next_round(record)
            if following is None:
                break
            rounds.append(following)
        code = _round(folder, record, len(rounds) - 1, train, judge)
        if code:
            return code
        record["cut_off"] = not is_whole(rounds[-1])
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
    if next_steps(record, counts) < per_epoch:
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


def _round(folder: Path, record: dict[str, Any], level: int, train: Train, judge: Judge) -> int:
    """Train and judge what is not yet of a round, as long as there is time; return an exit code if stopped, else 0."""
    one = record["rounds"][level]
    for again in (False, True):  # what was killed, most often for want of memory, is tried once more
        for number in one["members"]:
            run = folder / f"trial{number:02d}-round{level + 1}"
            killed = one["figures"].get(str(number)) == {} and record["failed"].get(run.name) == KILLED
            if str(number) in one["figures"] and not (again and killed):
                continue
            if is_over(record) and (again or not run.exists()):  # one that has begun comes to its end
                return 0
            code = _trial(folder, record, level, number, run, train, judge)
            if code:
                return code
    return 0


def _trial(
    folder: Path, record: dict[str, Any], level: int, number: int, run: Path, train: Train, judge: Judge
) -> int:
    """Train and judge one trial of a round; return an exit code if it was stopped, else 0."""
    one = record["rounds"][level]
    recipe = run.with_suffix(".yaml")
    settings = with_trial(record, number) | {"max_steps": one["steps"]}
    shown = ", ".join(f"{key} {value:g}" for key, value in record["trials"][number].items())
    logger.info("\nround %d, trial %d: %d steps with %s", level + 1, number, one["steps"], shown)
    record["under_way"] = run.name
    with room_in(folder):
        write(recipe, yaml.safe_dump(settings, sort_keys=False))
        _store(folder, record)
    began, is_new = time.monotonic(), not run.exists()
    code = 0 if finished(run) else train(flags_of(recipe, run, record["asked"]["seed"]))
    figures = {} if code or not finished(run) else _judged(folder, record, run, judge)
    taken = time.monotonic() - began
    record["spent"] += taken
    del record["under_way"]
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


def _seen_alive(run: Path) -> float:
    """Return for how many seconds a trial showed itself since it began, by the times of its files."""
    began = run.with_suffix(".yaml")
    times = [one.stat().st_mtime for one in (began, run, run / "log.jsonl", run / "checkpoints") if one.exists()]
    return max(times) - times[0] if began.exists() else 0.0


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


def _finish(folder: Path, record: dict[str, Any]) -> int:
    """Write and print what was found; return the exit code."""
    winners = [best_of(scores_of(record, level), 1) for level in range(len(judged_rounds(record)))]
    best = next((found[0] for found in reversed(winners) if found), None)
    record["best"] = best
    text = to_markdown(record)
    with room_in(folder):
        _store(folder, record)
        write(folder / TABLE, text)
        if best is not None:
            recipe = with_trial(record, best)
            (given,) = record["asked"]["settings"].values()
            left_out = {*OF_LENGTH, *({"logging_steps"} - given.keys())}
            kept = {key: one for key, one in recipe.items() if key not in left_out and one is not None}
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
