"""Pictures of an evaluation: which classes are taken for which, and what a model finds alike. Needs matplotlib."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.training.monitor.style import RIGHT, WRONG, new_figure

logger = logging.getLogger(__name__)

MAX_NAMED_CLASSES = 30


def can_draw() -> bool:
    """Return whether matplotlib is there; says so if not."""
    found = find_spec("matplotlib") is not None
    if not found:
        logger.warning("no pictures: matplotlib is not installed; pip install 'hf-vicreg[evaluation]'")
    return found


def confusion_matrix(labels: torch.Tensor, predictions: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return counts `(classes, classes)` int64: rows are true classes, columns predicted ones."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def draw_confusion(path: Path, counts: torch.Tensor, class_names: Sequence[str], title: str) -> None:
    """Write a picture of a confusion matrix, each row in percent of its true class.

    Args:
        path: PNG file to write.
        counts: `(classes, classes)`, as `confusion_matrix` gives them.
        class_names: One a class; left out of the picture where there are more than 30.
        title: Above the picture.
    """
    num_classes = len(counts)
    named = num_classes <= MAX_NAMED_CLASSES
    shares = 100 * counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    side = max(4.0, 0.5 * num_classes + 2) if named else 8.0
    figure = new_figure(side + 0.6, side)
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), vmin=0, vmax=100, cmap="Greens")
    figure.colorbar(image, ax=axes, label="% of the true class", fraction=0.046, pad=0.04)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(one_line(title), parse_math=False)
    if named:
        short = [name if len(name) <= 18 else name[:17] + "…" for name in map(one_line, class_names)]
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(num_classes), short, parse_math=False, **slanted)
        axes.set_yticks(range(num_classes), short, parse_math=False)
        for row in range(num_classes):
            for column in range(num_classes):
                share = float(shares[row, column])
                if share >= 0.5:
                    colour = "white" if share > 50 else "black"
                    axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, bbox_inches="tight")


def draw_neighbours(
    path: Path, rows: Sequence[tuple[Image.Image, str, Sequence[tuple[Image.Image, str, float, bool]]]], title: str
) -> None:
    """Write a picture of queries and what is nearest to them.

    Args:
        path: PNG file to write.
        rows: A query with its class name, and its neighbours: image, class name, cosine, whether the class is right.
        title: Above the picture.
    """
    columns = 1 + max(len(neighbours) for _, _, neighbours in rows)
    figure = new_figure(1.25 * columns, 1.5 * len(rows) + 0.5)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (query, name, neighbours) in zip(grid, rows, strict=True):
        _show(axes[0], query, name, "black", 3.0)
        axes[0].set_title(one_line(name)[:16], fontsize=8, fontweight="bold", parse_math=False)
        for place in range(1, columns):
            if place > len(neighbours):
                axes[place].axis("off")
                continue
            image, neighbour, cosine, right = neighbours[place - 1]
            colour = RIGHT if right else WRONG
            _show(axes[place], image, neighbour, colour, 2.5)
            axes[place].set_title(
                f"{one_line(neighbour)[:12]} {cosine:.3f}", fontsize=7, color=colour, parse_math=False
            )
    figure.suptitle(one_line(title), fontsize=10, parse_math=False)
    figure.savefig(path, bbox_inches="tight")


def _show(axes: Any, image: Image.Image, name: str, colour: str, width: float) -> None:
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=width)
