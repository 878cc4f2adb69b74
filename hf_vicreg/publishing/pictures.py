"""Pictures beside a model card: curves of the log, and the attention pattern at the encoder's image size."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_vicreg.modeling.bigbird_pattern import BlockPattern
from hf_vicreg.modeling.modeling_bigbird_vit import layer_pattern
from hf_vicreg.modeling.pattern_picture import COLOURS, LEGEND
from hf_vicreg.training.monitor.curves import with_ends
from hf_vicreg.training.monitor.style import INK, SERIES, new_figure, tidy

logger = logging.getLogger(__name__)

MAX_TILES = 1024  # of a pattern: its table has the square of that
PARTS = ("invariance", "variance", "covariance")  # of a run of before other objectives


def draw_pictures(folder: Path, config: Any, log: list[dict[str, Any]], results: dict[str, Any]) -> list[str]:
    """Draw what there is to draw into a folder and return the files' names; none where matplotlib is missing.

    Args:
        folder: Where to write `training_curves.png` and `attention_pattern.png`.
        config: The encoder's configuration; a pattern is drawn for a `BigBirdViTConfig` with sparse attention.
        log: The run's records, with `step` and what was measured there.
        results: What `results.json` holds, accuracies before and after training among it.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        logger.warning("no pictures for the card: matplotlib is not installed")
        return []
    drawn = []
    if any("loss" in record for record in log):
        _draw_curves(folder / "training_curves.png", with_ends(log, results), results.get("loss_parts") or PARTS)
        drawn.append("training_curves.png")
    if config.model_type == "bigbird_vit" and config.attention_type == "block_sparse":
        pattern = layer_pattern(config, *config.grid_size(*config.image_size_hw))
        if pattern.num_tiles <= MAX_TILES:
            _draw_pattern(folder / "attention_pattern.png", pattern)
            drawn.append("attention_pattern.png")
        else:
            logger.info("no picture of the attention pattern: it has %d tiles", pattern.num_tiles)
    return drawn


def _draw_curves(path: Path, log: list[dict[str, Any]], parts: Sequence[str]) -> None:
    steps = [record for record in log if "loss" in record]
    measured = [record for record in log if "knn_accuracy" in record]
    figure = new_figure(10, 3.2)
    has_parts = all(part in record for record in steps for part in parts)
    panels = figure.subplots(1, 1 + has_parts + bool(measured), squeeze=False)[0]
    at = [record["step"] for record in steps]
    panels[0].plot(at, [record["loss"] for record in steps], color=INK)
    panels[0].set_title("loss")
    if has_parts:
        for part, colour in zip(parts, SERIES, strict=False):
            panels[1].plot(at, [record[part] for record in steps], label=part, color=colour)
        panels[1].set_title("its parts, unweighted")
        if all(record[part] > 0 for record in steps for part in parts):
            panels[1].set_yscale("log")
        panels[1].legend(frameon=False)
    if measured:
        at = [record["step"] for record in measured]
        panels[-1].plot(at, [record["knn_accuracy"] for record in measured], marker="o", color=INK, label="first")
        if all("second_knn_accuracy" in record for record in measured):
            second = [record["second_knn_accuracy"] for record in measured]
            panels[-1].plot(at, second, marker="o", color=SERIES[1], label="second encoder")
            panels[-1].legend(frameon=False)
        panels[-1].set_title("k-NN accuracy")
    for panel in panels:
        panel.set_xlabel("step")
        title = panel.get_title()
        panel.set_title("")
        tidy(panel, title)
    _save(figure, path)


def _draw_pattern(path: Path, pattern: BlockPattern) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names = list(COLOURS)
    rows, columns = pattern.tile_grid
    table = [[names.index(level) for level in pattern.levels(tile)] for tile in range(pattern.num_tiles)]
    middle = table[(rows // 2) * columns + columns // 2]
    figure = new_figure(9, 4.6)
    left, right = figure.subplots(1, 2)
    colours = ListedColormap(list(COLOURS.values()))
    image = [middle[start : start + columns] for start in range(0, len(middle), columns)]
    for panel, cells, title in (
        (left, image, "what the middle tile sees"),
        (right, table, "which tile (row) sees which (column)"),
    ):
        lines = {"edgecolors": "white", "linewidth": 0.5} if len(cells) <= 100 else {}
        panel.pcolormesh(cells, cmap=colours, vmin=0, vmax=len(names) - 1, **lines)
        panel.invert_yaxis()
        panel.set_aspect("equal")
        panel.set_axis_off()
        panel.set_title(title)
    figure.legend(
        handles=[Patch(color=COLOURS[level], label=words) for level, words in LEGEND],
        loc="outside lower center",
        ncols=len(LEGEND),
        frameon=False,
    )
    grid = f"{pattern.grid[0]}x{pattern.grid[1]} patches in {rows}x{columns} tiles"
    figure.suptitle(f"First layer: {grid}, global tokens: {pattern.num_global_tokens}, density {pattern.density:.3f}")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    # no comments inside: the same data gives the same bytes, and nothing of the machine is in them
    figure.savefig(path, dpi=120, metadata={"Software": None})
