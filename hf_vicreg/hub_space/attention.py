"""Where each head of each layer looks from a patch, and which patches its pattern lets it see."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

LETTERS = {"query": "q", "global": "g", "local": "l", "random": "r", "": "."}


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of one image.

    Attributes:
        weights: `(layers, heads, queries, tokens)` float32, tokens in raster order, CLS and registers first.
        queries: Patches in raster order that look, -1 for CLS; in the order of `weights`.
        grid: Rows and columns of patches.
        leading: Tokens before the patches.
        tile_of_patch: The tile of each patch in raster order; empty without a pattern.
        levels: For each layer, a string of letters a patch for each query: how it sees each patch (`q` its own tile,
            `g` global, `l` local, `r` random, `.` not at all); empty without a pattern.
    """

    weights: torch.Tensor
    queries: list[int]
    grid: tuple[int, int]
    leading: int
    tile_of_patch: list[int]
    levels: list[list[str]]


def attention_maps(model: PreTrainedModel, pixels: torch.Tensor, queries: list[int] | None = None) -> AttentionMaps:
    """Return what `output_attentions` of the eager model says of one image.

    Args:
        model: An encoder whose layers attend over patches on a grid.
        pixels: `(1, channels, height, width)`, normalised.
        queries: Patches that look, -1 for CLS, which is left out where there is none; default: all, and CLS.

    Raises:
        ValueError: A model without attention over patches.
    """
    height, width = pixels.shape[-2:]
    grid = grid_of(model, height, width)
    with torch.no_grad(), eager(model):
        outputs = model(pixel_values=pixels.to(model.device), output_attentions=True)
    attentions = getattr(outputs, "attentions", None)
    patches = grid[0] * grid[1]
    if not attentions or any(one is None or one.ndim != 4 or one.shape[-1] < patches for one in attentions):
        raise ValueError(f"`MODEL`: expected one with attention over patches, got a {model.config.model_type!r}.")
    stacked = torch.stack([one[0].float().cpu() for one in attentions])
    leading = stacked.shape[-1] - patches
    asked = [-1, *range(patches)] if queries is None else queries
    queries = [one for one in asked if one >= 0 or leading]
    places = torch.tensor([0 if one < 0 else leading + one for one in queries])
    tiles, levels = _levels(model, height, width, queries)
    return AttentionMaps(stacked[:, :, places].contiguous(), queries, grid, leading, tiles, levels)


def grid_of(model: PreTrainedModel, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of patches of an image of `height` x `width` pixels.

    Raises:
        ValueError: A model without patches.
    """
    config: Any = model.config
    if hasattr(config, "grid_size"):
        return config.grid_size(height, width)
    size = getattr(config, "patch_size", None)
    if size is None:
        raise ValueError(f"`MODEL`: expected one with attention over patches, got a {config.model_type!r}.")
    rows, columns = (size, size) if isinstance(size, int) else size
    return height // rows, width // columns


def lattice(rows: int, columns: int, most: int) -> list[int]:
    """Return at most `most` patches of a grid, spread evenly over it: all of them if they are no more."""
    if rows * columns <= most:
        return list(range(rows * columns))
    lines = min(rows, most, max(1, math.isqrt(most * rows // columns)))
    along = min(columns, most // lines)
    places = [
        [(2 * at + 1) * side // (2 * count) for at in range(count)]
        for side, count in ((rows, lines), (columns, along))
    ]
    return [row * columns + column for row in places[0] for column in places[1]]


@contextmanager
def eager(model: PreTrainedModel):
    """Let a model compute its attention in the form that has probabilities."""
    found = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(found)


def _levels(model: Any, height: int, width: int, queries: list[int]) -> tuple[list[int], list[list[str]]]:
    if model.config.model_type != "bigbird_vit" or not hasattr(model, "attention_patterns"):
        return [], []
    patterns = model.attention_patterns(height, width)
    tiles = torch.empty_like(patterns[0].tile_of_patch)
    tiles[patterns[0].order] = patterns[0].tile_of_patch
    tile_of_patch = tiles.tolist()
    levels = []
    for pattern in patterns:
        lines: dict[int, list[str]] = {}
        for tile in {tile_of_patch[one] for one in queries if one >= 0}:
            letters = [LETTERS[level] for level in pattern.levels(tile)]
            lines[tile] = [letters[other] for other in tile_of_patch]
        seen_by_all = ["g"] * len(tile_of_patch)
        levels.append(["".join(seen_by_all if one < 0 else lines[tile_of_patch[one]]) for one in queries])
    return tile_of_patch, levels
