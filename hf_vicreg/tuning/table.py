"""What the trials of a tuning came to, as a table in Markdown."""

import math
from typing import Any

from hf_vicreg.comparison.table import aligned
from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.training.planner.schedule import words
from hf_vicreg.tuning.rounds import LOWER, is_whole, judged_rounds, value_of_judge

MISSING = "Trial 0, which has what was planned, failed: whether tuning was worth it is not known."


def to_markdown(record: dict[str, Any]) -> str:
    """Return a row for each trial, the ones that came farthest first, and what is to be known of them."""
    rounds, judge = record["rounds"], record["judge"]
    scores = {
        number: [value_of_judge(one["figures"].get(str(number), {}), judge) for one in judged_rounds(record)]
        for number in range(len(record["trials"]))
    }

    def place(number: int) -> tuple:
        found = [score for score in scores[number] if not math.isnan(score)]
        return (-len(found), [-score for score in reversed(found)], number)

    headings = ["trial", *record["space"], *(f"{one['steps']:,} steps" for one in rounds)]
    rows = [
        [
            str(number),
            *(f"{value:g}" for value in record["trials"][number].values()),
            *(_shown(one["figures"].get(str(number)), judge) for one in rounds),
        ]
        for number in sorted(scores, key=place)
    ]
    first = rounds[0]["figures"].get("0")  # none yet, or none at all
    missing = [] if first is None or judge in first else [f"{MISSING}\n"]
    return "\n".join([*missing, *aligned(headings, rows), "", *(f"- {note}" for note in _notes(record))]) + "\n"


def _shown(figures: dict[str, float] | None, judge: str) -> str:
    if figures is None:
        return "-"
    return f"{figures[judge]:.4g}" if judge in figures else "failed"


def _notes(record: dict[str, Any]) -> list[str]:
    judge = record["judge"]
    what = "k-NN accuracy on held-out images" if judge == "knn" else f"{judge}, without labels"
    better = "less" if judge in LOWER else "more"
    notes = [
        f"Judged by {what}; {better} is better. Trial 0 has what was planned; each round trains anew.",
        f"It took {words(record['spent'])} of the {words(record['asked']['seconds'])} given.",
    ]
    if judge == "knn":
        notes.append("The best of several is judged too well by the images it was chosen on: measure it on others.")
    if record.get("cut_off"):
        rounds, whole = record["rounds"], judged_rounds(record)
        when = "before" if is_whole(rounds[-1]) else "in"
        number, best = len(whole) + 1, "the round before"
        if not is_whole(rounds[0]):
            number, best = 1, "those that were tried"
        notes.append(
            f"The time was over {when} round {number}: the best is that of {best}. Give more, or fewer --trials."
        )
    return notes + [f"{one_line(name)} failed, exit code {code}." for name, code in record["failed"].items()]


__all__ = ["to_markdown"]
