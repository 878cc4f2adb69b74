"""What a model sees, as figures for a notebook: attention, patches as colours, views. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from hf_vicreg.hub_space.attention import LETTERS
from hf_vicreg.hub_space.colours import PatchColours, colour_images
from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.modeling.pattern_picture import COLOURS, LEGEND
from hf_vicreg.report.attention import attention_maps
from hf_vicreg.report.patches import given_at, patch_tokens
from hf_vicreg.report.pictures import views_of
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import POOLED, VisionEncoder, load_processor, load_vision_encoder
from hf_vicreg.training.monitor.style import new_figure, picture_of


def show_attention(
    model: str | Path | PreTrainedModel,
    image: Image.Image,
    *,
    patch: tuple[int, int] | None = None,
    layers: Sequence[int] | None = None,
    processor: BaseImageProcessor | None = None,
) -> Any:
    """Return a figure of where each head of each layer looks from one patch of an image.

    Bright is looked at most, each map by its own largest value. Around each tile that the layer's pattern lets the
    patch see lies a line in the colour of its level: global, local, random. What it forbids is exactly 0.

    Args:
        model: An encoder with attention over patches, or the folder or Hub id of one.
        image: Any kind of PIL image.
        patch: Row and column of the patch that looks, from 0 on; default: the middle one.
        layers: Which ones to show, from 0 on; default: all.
        processor: What prepares the image; default: the model's own.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InputError: A model without attention over patches, a patch or a layer that it has not, or no matplotlib.
    """
    encoder = _encoder(model, processor)
    given = given_at(encoder, [image], 1)
    maps = attention_maps(encoder.model, given.pixels, None)
    rows, columns = maps.grid
    row, column = (rows // 2, columns // 2) if patch is None else patch
    if not (0 <= row < rows and 0 <= column < columns):
        raise InputError(f"`patch`: expected a row below {rows} and a column below {columns}, got {(row, column)}.")
    num_layers, num_heads = maps.weights.shape[:2]
    layers = range(num_layers) if layers is None else layers
    if not layers or not all(0 <= one < num_layers for one in layers):
        raise InputError(f"`layers`: expected some of 0 to {num_layers - 1}, got {list(layers)}.")
    query = maps.queries.index(row * columns + column)
    figure = _figure(1.5 * (num_heads + 1), 1.6 * len(layers) + 0.5)
    grid = figure.subplots(len(layers), num_heads + 1, squeeze=False)
    for line, layer in zip(grid, layers, strict=True):
        picture_of(line[0], given.shown[0], f"layer {layer}")
        line[0].add_patch(_box(column, row, columns, rows, given.shown[0].size))
        for head, axes in enumerate(line[1:]):
            weights = maps.weights[layer, head, query, maps.leading :].view(rows, columns)
            picture_of(axes, weights.numpy(), f"head {head}")
            axes.images[0].set(cmap="inferno", clim=(0, float(weights.max()) or 1))
            if maps.levels:
                _outline(axes, maps.levels[layer][query], maps.tile_of_patch, columns)
    if maps.levels:
        from matplotlib.patches import Patch

        handles = [Patch(color=COLOURS[level], label=words) for level, words in LEGEND]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def show_features(
    model: str | Path | PreTrainedModel,
    images: Sequence[Image.Image],
    *,
    scale: int = 1,
    processor: BaseImageProcessor | None = None,
) -> Any:
    """Return a figure of images and, below each, its patches in the colours of their tokens' principal components.

    Patches of like colours have like tokens, in all of these images.

    Args:
        model: An encoder with a token for each patch, or the folder or Hub id of one.
        images: PIL images.
        scale: How many times the model's own image size to look at.
        processor: What prepares the images; default: the model's own.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InputError: No images, a model without a token for each patch, or no matplotlib.
    """
    if not images:
        raise InputError("`images`: expected at least one, got none.")
    encoder = _encoder(model, processor)
    given = given_at(encoder, list(images), scale)
    tokens = patch_tokens(encoder, given.pixels)
    figure = _figure(1.6 * len(images) + 0.2, 3.4)
    grid = figure.subplots(2, len(images), squeeze=False)
    for above, below, image, colours in zip(
        grid[0], grid[1], given.shown, colour_images(PatchColours(tokens)(tokens)), strict=True
    ):
        picture_of(above, image)
        picture_of(below, colours)
    return figure


def show_views(
    image: Image.Image, views: dict[str, Any] | None = None, *, image_size: int = 224, count: int = 8, seed: int = 0
) -> Any:
    """Return a figure of an image and of views that pretraining would draw of it.

    Args:
        image: Any kind of PIL image.
        views: As the section `views` of a recipe; default: the default ones.
        image_size: Side of a view in pixels, where `views` has none.
        count: How many views.
        seed: Of the draw.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InputError: Views that cannot be drawn, or no matplotlib.
    """
    drawn = views_of(image.convert("RGB"), views or {}, image_size, count, seed)
    columns = min(5, 1 + count)
    figure = _figure(1.6 * columns, 1.7 * -(-(1 + count) // columns))
    places = figure.subplots(-(-(1 + count) // columns), columns, squeeze=False).flatten()
    for axes in places:
        axes.axis("off")
    for axes, shown, title in zip(places, [image, *drawn], ["image", *["view"] * count], strict=False):
        axes.axis("on")
        picture_of(axes, shown, title)
    return figure


def _encoder(model: str | Path | PreTrainedModel, processor: BaseImageProcessor | None) -> VisionEncoder:
    if not isinstance(model, PreTrainedModel):
        encoder = load_vision_encoder(str(model))
        return encoder if processor is None else VisionEncoder(**vars(encoder) | {"processor": processor})
    if model.training:
        raise InputError("`model`: expected one in evaluation mode, got one in training; call `model.eval()`.")
    name = model.name_or_path
    own = processor or load_processor(name or "no folder", model.config)
    return VisionEncoder(one_line(name or "the model"), model, own, POOLED, "")


def _figure(width: float, height: float) -> Any:
    try:
        return new_figure(width, height)
    except ImportError as error:
        raise InputError("`matplotlib`: expected to be installed; pip install matplotlib.") from error


def _box(column: int, row: int, columns: int, rows: int, size: tuple[int, int]) -> Any:
    from matplotlib.patches import Rectangle

    width, height = size[0] / columns, size[1] / rows
    corner = (column * width - 0.5, row * height - 0.5)
    return Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=1.6)


def _outline(axes: Any, letters: str, tile_of_patch: list[int], columns: int) -> None:
    """Draw a line in the level's colour around each tile that is seen."""
    from matplotlib.patches import Rectangle

    colour_of = {letter: COLOURS[level] for level, letter in LETTERS.items()}
    tiles: dict[int, list[int]] = {}
    for place, tile in enumerate(tile_of_patch):
        tiles.setdefault(tile, []).append(place)
    for places in tiles.values():
        letter = letters[places[0]]
        if letter == ".":
            continue
        rows, along = {place // columns for place in places}, {place % columns for place in places}
        if len(places) != len(rows) * len(along):  # a run of patches in raster order that is no rectangle
            continue
        colour = "white" if letter == "q" else colour_of[letter]
        corner = (min(along) - 0.44, min(rows) - 0.44)
        axes.add_patch(Rectangle(corner, len(along) - 0.12, len(rows) - 0.12, fill=False, edgecolor=colour))
