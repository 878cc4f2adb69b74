"""Which round of a tuning comes next and for how long, and which of them say who is the best."""

import math
from typing import Any

from hf_vicreg.tuning.halving import best_of, counts_of, steps_for

LOWER = ("alignment_uniformity",)  # of the judges, of which less is better


def next_round(record: dict[str, Any]) -> dict[str, Any] | None:
    """Return the next round, of the better half; of fewer, where the time holds no longer trials of so many.

    None if there is none: two were compared already, the others failed, or the time is over, which is noted.
    """
    counts, rounds = counts_of(record["asked"]["trials"]), record["rounds"]
    if not rounds:
        steps = max(record["plan"]["steps_per_epoch"], next_steps(record, counts))
        return {"steps": steps, "members": list(range(counts[0])), "figures": {}}
    for count in [one for one in counts if one < len(rounds[-1]["members"])]:
        members = best_of(scores_of(record, -1), count)
        if len(members) < 2:
            return None
        steps = next_steps(record, [len(members), *(one for one in counts if one < len(members))])
        if steps > rounds[-1]["steps"]:  # the same steps again would come to the same
            return {"steps": steps, "members": members, "figures": {}}
        record["cut_off"] = True
    return None


def next_steps(record: dict[str, Any], counts: list[int]) -> int:
    """Return the steps of the next round: what is left of the time, shared out, by what the trials before it took.

    Args:
        record: Of the tuning.
        counts: Of trials, of that round and those that follow.
    """
    plan, measured = record["plan"], record["measured"]
    step, other = plan["step_seconds"], record["spent"]  # a plan starts Python, reads images and tries a few steps
    if measured["trials"]:
        step = measured["training_seconds"] / measured["steps"]
        other = (measured["seconds"] - measured["training_seconds"]) / measured["trials"]
    left = record["asked"]["seconds"] - record["spent"]
    return steps_for(left, counts, step_seconds=step, other_seconds=other)


def is_over(record: dict[str, Any]) -> bool:
    """Whether all the time that was given is spent."""
    return record["spent"] >= record["asked"]["seconds"]


def is_whole(one: dict[str, Any]) -> bool:
    """Return whether every trial of a round was tried."""
    return all(str(number) in one["figures"] for number in one["members"])


def judged_rounds(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rounds that say which trial is the best: those that are whole; the first, if none is."""
    return [one for one in record["rounds"] if is_whole(one)] or record["rounds"][:1]


def scores_of(record: dict[str, Any], level: int) -> dict[int, float]:
    """Return the scores of a round by trial, more is better; NaN of those that failed."""
    found = record["rounds"][level]["figures"]
    return {int(number): value_of_judge(figures, record["judge"]) for number, figures in found.items()}


def value_of_judge(figures: dict[str, float], judge: str) -> float:
    """Return a trial's score, of which more is better; NaN where it has none."""
    value = figures.get(judge, math.nan)
    return -value if judge in LOWER else value


__all__ = ["LOWER", "is_over", "is_whole", "judged_rounds", "next_round", "next_steps", "scores_of", "value_of_judge"]
