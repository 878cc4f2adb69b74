"""The picture at the top of the README: a photograph, its attention pattern, its features and what is near to what.

Usage: python docs/opening_pictures.py, with matplotlib and scikit-learn installed. The photographs are scikit-learn's
samples (CC BY 2.0: china.jpg by danielbuechele, flower.jpg by vultilion); the encoder is `cifar10_cpu`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import AutoImageProcessor

import hf_vicreg
from hf_vicreg.hub_space.colours import PatchColours, colour_images
from hf_vicreg.modeling.modeling_bigbird_vit import layer_pattern
from hf_vicreg.modeling.pattern_picture import COLOURS, LEGEND
from hf_vicreg.training.monitor.style import INK, SOFT, new_figure

PICTURE = Path(__file__).parent / "images" / "opening.png"
GROUND = "#fcfcfa"  # of the picture itself: it stands on light pages and on dark ones
SIZE = 256  # side in pixels of what the encoder is shown
TILE, LOOKING = 4, (5, 9)  # patches a side of a tile; row and column of the one that looks
CROP, QUERIES, NEAREST = 61, (24, 37, 94), 5  # side of a crop in pixels; which of them look for others
WIDTH, HEIGHT, MARGIN, TITLE = 15.6, 3.86, 0.16, 0.44  # in inches
TEXT = 15
PANEL, SMALL = 2.98, 0.92  # sides of a panel and of a crop
ORDER = [
    1,
    2,
    0,
]  # components as red, green, blue: the first is blue against yellow, which all tell apart


def main() -> None:
    model = hf_vicreg.load("cifar10_cpu")
    processor = AutoImageProcessor.from_pretrained(model.name_or_path)
    china, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    figure = new_figure(WIDTH, HEIGHT)
    figure.set_layout_engine("none")
    figure.set_facecolor(GROUND)
    photograph, pattern, features = (
        _axes(figure, MARGIN + at * (PANEL + MARGIN), HEIGHT - TITLE - PANEL, PANEL) for at in range(3)
    )
    square = flower.crop((108, 0, 535, 427)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    _show(photograph, square, "a photograph, no label")
    _draw_pattern(pattern, square, model.config)
    _draw_features(features, model, processor, square)
    _draw_neighbours(figure, model, processor, [china, flower])
    _save(figure)


def _axes(figure: Any, left: float, bottom: float, side: float) -> Any:
    return figure.add_axes((left / WIDTH, bottom / HEIGHT, side / WIDTH, side / HEIGHT))


def _show(axes: Any, image: Image.Image, title: str) -> None:
    axes.imshow(image)
    axes.set_axis_off()
    axes.set_title(title, fontsize=TEXT, color=INK)


def _draw_pattern(axes: Any, image: Image.Image, config: Any) -> None:
    """Show the image through the tiles that one tile attends to, in the colours of their levels."""
    from matplotlib.patches import Patch, Rectangle

    # the encoder as it is has smaller tiles and no global ones
    shown = type(config).from_dict(
        config.to_dict() | {"num_global_tiles": 2, "num_random_blocks": 4, "tile_size": TILE}
    )
    drawn = layer_pattern(shown, *shown.grid_size(SIZE, SIZE))
    rows, columns = drawn.tile_grid
    _show(axes, image, "what a tile of it attends to")
    across, down = SIZE / columns, SIZE / rows
    for tile, level in enumerate(drawn.levels(LOOKING[0] * columns + LOOKING[1])):
        corner = (tile % columns * across - 0.5, tile // columns * down - 0.5)
        veil = {"facecolor": GROUND, "alpha": 0.72, "linewidth": 0}
        mark = {"facecolor": COLOURS[level], "alpha": 0.85, "edgecolor": "white", "linewidth": 1}
        axes.add_patch(Rectangle(corner, across, down, **(mark if level else veil)))
    words = {"query": "itself", "global": "global", "local": "local", "random": "random"}
    handles = [Patch(color=COLOURS[level], label=words[level]) for level, _ in LEGEND]
    _key(axes, handles=handles)


def _draw_features(axes: Any, model: Any, processor: Any, image: Image.Image) -> None:
    pixels = processor(image, size={"height": SIZE, "width": SIZE}, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state[:, 1:]
    rows, columns = model.config.grid_size(SIZE, SIZE)
    tokens = tokens.unflatten(1, (rows, columns))
    _show(axes, colour_images(PatchColours(tokens)(tokens)[..., ORDER])[0], "its patches by their features")


def _draw_neighbours(figure: Any, model: Any, processor: Any, photographs: list[Image.Image]) -> None:
    crops = [
        photograph.crop((left, top, left + CROP, top + CROP))
        for photograph in photographs
        for top in range(0, photograph.height - CROP + 1, CROP)
        for left in range(0, photograph.width - CROP + 1, CROP)
    ]
    with torch.no_grad():
        features = model(**processor(crops, return_tensors="pt")).pooler_output
    directions = torch.nn.functional.normalize(features, dim=1)
    start, gap = 4 * MARGIN + 3 * PANEL + 0.1, (PANEL - len(QUERIES) * SMALL) / (len(QUERIES) - 1)
    for row, query in enumerate(QUERIES):
        bottom = HEIGHT - TITLE - (row + 1) * SMALL - row * gap
        nearest = (directions @ directions[query]).argsort(descending=True).tolist()
        for column, place in enumerate(nearest[: 1 + NEAREST]):
            axes = _axes(figure, start + column * (SMALL + gap / 2), bottom, SMALL)
            axes.imshow(crops[place])
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=INK if place == query else GROUND, linewidth=4 if place == query else 0)
    middle = start + (1 + NEAREST) * (SMALL + gap / 2) / 2
    place = (middle / WIDTH, 1 - (TITLE - 0.085) / HEIGHT)
    figure.text(*place, f"a crop, and the {NEAREST} nearest of {len(crops)}", fontsize=TEXT, color=INK, ha="center")


def _key(axes: Any, handles: list[Any]) -> None:
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.01), "ncols": 4, "frameon": False}
    spacing = {"handlelength": 0.9, "handletextpad": 0.4, "columnspacing": 0.9}
    axes.legend(handles=handles, fontsize=TEXT, labelcolor=SOFT, **place, **spacing)


def _save(figure: Any) -> None:
    figure.canvas.draw()
    shot = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    shot.save(PICTURE, optimize=True)  # in all colours: with a palette those of the levels are not the legend's


if __name__ == "__main__":
    main()
