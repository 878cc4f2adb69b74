"""A comparison as a picture: a row for each objective, a dot for each seed, a bar at their mean."""

import logging
from pathlib import Path
from typing import Any

from hf_vicreg.comparison.table import COLUMNS
from hf_vicreg.training.monitor.style import INK, SERIES, new_figure, tidy

logger = logging.getLogger(__name__)

DRAWN = ("knn_accuracy", "linear_accuracy", "encoder_rank", "images_per_second")


def draw(record: dict[str, Any], path: Path) -> bool:
    """Draw a comparison that has runs; return whether the file was written, which takes matplotlib."""
    runs, table = record["runs"], record["table"]
    columns = [column for column in DRAWN if any(column in row for row in table.values())]
    names = list(record["asked"]["settings"])
    try:
        figure = new_figure(1.2 + 2.8 * len(columns), 1.2 + 0.42 * len(names))
    except ImportError:
        logger.info("matplotlib is not installed, so there is no %s; pip install matplotlib", path.name)
        return False
    for column, axes in zip(columns, figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], strict=True):
        tidy(axes, COLUMNS[column][0].format(neighbours=runs[0]["neighbours"]))
        axes.grid(visible=False, axis="y")
        for at, name in enumerate(names):
            values = [one[column] for one in runs if one["objective"] == name and column in one]
            axes.scatter(values, [at] * len(values), s=26, color=SERIES[at % len(SERIES)], alpha=0.75, linewidths=0)
            if values:
                axes.plot([table[name][column]["mean"]] * 2, [at - 0.28, at + 0.28], color=INK, linewidth=1.2)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
    figure.savefig(path)
    return True
