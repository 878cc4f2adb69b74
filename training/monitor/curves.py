"""A run's curves as one picture."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_vicreg.training.monitor.style import new_figure, tidy
from hf_vicreg.training.objectives.vicreg import VICREG

logger = logging.getLogger(__name__)

CURVES_FILE = "curves.png"


def draw_curves(records: list[dict[str, Any]], path: Path, names_of_parts: Sequence[str] = VICREG.parts) -> bool:
    """Draw loss, spread, rank and accuracies over the steps.

    matplotlib is not a requirement of the package: a run on a machine without it says so in the log and goes on.

    Args:
        records: Lines of log.jsonl, `with_ends` if accuracies were measured there.
        path: PNG file to write.
        names_of_parts: Of the loss.

    Returns:
        Whether the file was written.
    """
    try:
        figure = new_figure(10, 6)
    except ImportError:
        logger.info("matplotlib is not installed, so there is no %s; pip install matplotlib", path.name)
        return False
    figure.set_layout_engine(None)  # margins by hand: to find them takes longer than to draw
    figure.subplots_adjust(left=0.065, right=0.985, bottom=0.085, top=0.94, hspace=0.34, wspace=0.17)
    ((loss, parts), (spread, accuracy)) = figure.subplots(2, 2)
    names = {
        f"{whose}{kind}_accuracy": f"{text}{kind.replace('knn', 'k-NN')}"
        for whose, text in (("", ""), ("second_", "second encoder: "))
        for kind in ("knn", "linear")
    }
    measured = any(name in record for record in records for name in names)
    for axes, title in (
        (loss, "loss"),
        (parts, "its parts, unweighted"),
        (spread, "spread; collapsed at 0"),
        (accuracy, "accuracy" if measured else "effective rank"),
    ):
        tidy(axes, title)
    _draw(loss, records, {"loss": "loss"})
    _draw(parts, records, {name: name.replace("_", " ") for name in names_of_parts})
    if all(record.get(name, 1) > 0 for record in records for name in names_of_parts):
        parts.set_yscale("log")
    _draw(
        spread,
        records,
        {
            "embedding_std_mean": "embeddings: mean standard deviation",
            "embedding_std_min": "embeddings: smallest",
            "encoder_spread": "encoder: share that differs",
            "second_encoder_spread": "second encoder: share that differs",
        },
    )
    spread.set_ylim(bottom=0)
    if measured:
        _draw(accuracy, records, names, marker="o")
    else:  # no labels: the ranks say more than an empty picture
        _draw(accuracy, records, {"embedding_rank": "embeddings", "encoder_rank": "encoder"})
    for axes in (loss, parts, spread, accuracy):
        axes.set_xlabel("step")
        if len(axes.lines) > 1:
            axes.legend(fontsize="small", frameon=False)
    figure.savefig(path)
    return True


def with_ends(records: list[dict[str, Any]], results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a log's records between the accuracies of the untrained and of the trained encoders, as records.

    Args:
        records: Lines of log.jsonl, which has the accuracies between the two.
        results: What `results.json` holds.
    """
    first, last = ({"step": step} for step in (0, results.get("steps", 0)))
    for kind in ("knn_accuracy", "linear_accuracy"):
        measured = results.get(kind) or {}
        for record, when in ((first, "untrained"), (last, "trained")):
            for whose in ("", "second_"):
                if f"{whose}{when}" in measured:
                    record[f"{whose}{kind}"] = measured[f"{whose}{when}"]
    return [*([first] if len(first) > 1 else []), *records, *([last] if len(last) > 1 else [])]


def _draw(axes: Any, records: list[dict[str, Any]], names: dict[str, str], **style: Any) -> None:
    """Draw the figures that there are."""
    for key, label in names.items():
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
