"""Patches of windows as vectors, of tokens or of pixels, and the class of each."""

import copy
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from hf_vicreg.training.evaluation.encoder import VisionEncoder
from hf_vicreg.training.tasks.segmentation.masks import IGNORED

# of windows `(n, channels, height, width)` patches `(n, rows, columns, size)`, or of patches `(n, size)` scores
# `(n, classes)`
Describe = Callable[[torch.Tensor], torch.Tensor]


def untrained(encoder: VisionEncoder, seed: int) -> VisionEncoder:
    """Return the same model with new weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = type(encoder.model)(copy.deepcopy(encoder.model.config))
    return dataclasses.replace(encoder, model=model.to(encoder.model.device).eval())


def tokens_by(encoder: VisionEncoder) -> Describe:
    """Return what makes patch tokens of windows."""
    return lambda pixels: encoder.patch_tokens(encoder.outputs(pixels), *pixels.shape[-2:]).float().cpu()


def pixels_of_patches(pixels: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the pixels below each of `rows` x `columns` equal parts of windows, `(n, rows, columns, size)`."""
    side = max(pixels.shape[-2] // rows, pixels.shape[-1] // columns, 1)
    size = (rows * side, columns * side)
    even = pixels if pixels.shape[-2:] == size else F.interpolate(pixels, size, mode="bilinear")
    parts = even.unfold(2, side, side).unfold(3, side, side)  # (n, channels, rows, columns, side, side)
    return parts.permute(0, 2, 3, 1, 4, 5).flatten(3).contiguous().cpu()


def classes_of_patches(classes: torch.Tensor, rows: int, columns: int, num_classes: int) -> torch.Tensor:
    """Return the class of most pixels of each part, the lowest of equals, `IGNORED` where none is known.

    Args:
        classes: `(height, width)` int64.
        rows: Of parts.
        columns: The same.
        num_classes: That there are.
    """
    height, width = classes.shape
    down = torch.arange(height) * rows // height
    across = torch.arange(width) * columns // width
    part = (down[:, None] * columns + across).expand_as(classes)
    known = classes != IGNORED
    counts = torch.zeros(rows * columns, num_classes, dtype=torch.int64)
    places = (part * num_classes + classes)[known]
    counts.view(-1).scatter_add_(0, places, torch.ones_like(places))
    found = counts.argmax(1).masked_fill(counts.sum(1) == 0, IGNORED)
    return found.view(rows, columns)
