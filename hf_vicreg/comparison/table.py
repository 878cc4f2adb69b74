"""What finished runs came to, by objective: mean and spread over the seeds, as numbers and as a table."""

import statistics
from typing import Any

from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.training.planner.schedule import words

# by the names of `figures_of`: heading, and how a value is shown
COLUMNS: dict[str, tuple[str, str]] = {
    "knn_accuracy": ("{neighbours}-NN", ".3f"),
    "linear_accuracy": ("linear", ".3f"),
    "encoder_rank": ("effective rank", ".1f"),
    "images_per_second": ("images/s", ",.0f"),
    "steps": ("steps", ",.0f"),
    "training_seconds": ("seconds", ",.1f"),
    "peak_memory": ("memory, GB", ".2f"),
}
GIGABYTE = 2**30
UNEQUAL_RATIO = 0.1  # of the time that was asked for


def figures_of(results: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one run, those of `COLUMNS` that it has, its `hardware`, `neighbours` and what is `wrong`.

    Args:
        results: Its `results.json`.
        plan: Of `plan_comparison`; the memory is that of its trial.
    """
    recipe = plan["recipe"]
    images = results["steps"] * (recipe["statistics_batch_size"] or recipe["batch_size"])
    found = {
        "knn_accuracy": (results.get("knn_accuracy") or {}).get("trained"),
        "linear_accuracy": (results.get("linear_accuracy") or {}).get("trained"),
        "encoder_rank": (results.get("health") or {}).get("encoder_rank"),
        "images_per_second": images / results["training_seconds"] if results["training_seconds"] else None,
        "steps": results["steps"],
        "training_seconds": results["training_seconds"],
        "peak_memory": plan["peak_memory"] / GIGABYTE,
    }
    present = [one["name"] for one in results.get("verdicts") or [] if one.get("present")]
    shown = {name: one for name, one in found.items() if isinstance(one, int | float)}
    return shown | {"hardware": results.get("hardware"), "neighbours": results.get("knn_neighbours"), "wrong": present}


def summary_of(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return mean and spread of each figure over the runs of each objective.

    Args:
        runs: Each `objective` and figures.

    Returns:
        By objective and figure `mean`, `std` (the sample standard deviation, over n - 1; None for a single run) and
        `runs`, n.
    """
    table: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in dict.fromkeys(one["objective"] for one in runs):
        for column in COLUMNS:
            values = [one[column] for one in runs if one["objective"] == name and column in one]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                table.setdefault(name, {})[column] = {
                    "mean": statistics.fmean(values),
                    "std": spread,
                    "runs": len(values),
                }
    return table


def to_markdown(record: dict[str, Any]) -> str:
    """Return the table with what is to be known of it, as Markdown that reads well on a terminal, too."""
    asked, runs, table = record["asked"], record["runs"], record["table"]
    columns = [column for column in COLUMNS if any(column in row for row in table.values())]
    neighbours = next((one["neighbours"] for one in runs), 20)
    headings = ["objective", "runs", *(COLUMNS[column][0].format(neighbours=neighbours) for column in columns)]
    rows = [
        [
            name,
            f"{sum(one['objective'] == name for one in runs)} of {len(asked['seeds'])}",
            *(_shown(table.get(name, {}).get(column), COLUMNS[column][1]) for column in columns),
        ]
        for name in asked["settings"]
    ]
    return "\n".join([*aligned(headings, rows), "", *_notes(record)]) + "\n"


def aligned(headings: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table in Markdown, cells as wide as their columns, all but the first to the right."""
    widths = [max(len(row[at]) for row in (headings, *rows)) for at in range(len(headings))]
    rule = "| " + " | ".join(_rule(width, at) for at, width in enumerate(widths)) + " |"
    return [_line(headings, widths), rule, *(_line(row, widths) for row in rows)]


def _notes(record: dict[str, Any]) -> list[str]:
    asked, runs = record["asked"], record["runs"]
    spread = "; mean ± standard deviation over the seeds" if len(asked["seeds"]) > 1 else ""
    notes = [f"Each run trained for about {words(asked['seconds'])}{spread}."]
    hardware = sorted({one_line(str(one["hardware"])) for one in runs})
    if hardware:
        notes.append(f"On {' and '.join(hardware)}. Memory is the peak of a few trial steps.")
    if not any("knn_accuracy" in one for one in runs):
        notes.append("No labels, so no accuracies: an effective rank alone does not say which encoder is better.")
    for one in runs:
        off = one["training_seconds"] / asked["seconds"] - 1
        if abs(off) > UNEQUAL_RATIO:
            notes.append(
                f"{one['folder']} trained {abs(off):.0%} {'longer' if off > 0 else 'shorter'} than asked for."
            )
        if one["wrong"]:
            notes.append(f"{one['folder']}: {one_line(', '.join(map(str, one['wrong'])))} (`hf-vicreg doctor` on it).")
    notes += [
        f"{one_line(name)} failed, exit code {code}; the same command tries again."
        for name, code in record["failed"].items()
    ]
    return [f"- {note}" for note in notes]


def _shown(found: dict[str, Any] | None, form: str) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:{form}}" + ("" if found["std"] is None else f" ± {found['std']:{form}}")


def _line(cells: list[str], widths: list[int]) -> str:
    aligned = (
        f"{cell:<{width}}" if not at else f"{cell:>{width}}"
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join(aligned) + " |"


def _rule(width: int, at: int) -> str:
    return "-" * width if not at else "-" * (width - 1) + ":"
