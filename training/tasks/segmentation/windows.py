"""Images of any size through a model that sees windows of one size."""

import math
from collections.abc import Callable

import torch


def windowed_logits(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    pixels: torch.Tensor,
    window: tuple[int, int],
    batch_size: int = 8,
) -> torch.Tensor:
    """Return the logits of a whole image `(classes, height, width)` float32.

    Windows lie at most half a window apart, the last one at the image's end. Where several see a pixel, their logits
    are averaged, each weighted by how far from its window's border it is: no seams. What of a window is outside of a
    smaller image is 0, the mean colour.

    Args:
        logits_of: The model: `(windows, channels, *window)` to `(windows, classes, *window)`.
        pixels: `(channels, height, width)`, normalised.
        window: (height, width) in pixels.
        batch_size: Windows at once.
    """
    height, width = pixels.shape[-2:]
    missing = [max(0, side - own) for side, own in zip(window, (height, width), strict=True)]
    pixels = torch.nn.functional.pad(pixels, (0, missing[1], 0, missing[0]))
    places = [
        (top, left) for top in starts(pixels.shape[-2], window[0]) for left in starts(pixels.shape[-1], window[1])
    ]
    weight = smooth_weight(window).to(pixels.device)
    weights = torch.zeros(pixels.shape[-2:], device=pixels.device)
    total: torch.Tensor | None = None
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        cut = [pixels[:, top : top + window[0], left : left + window[1]] for top, left in some]
        for logits, (top, left) in zip(logits_of(torch.stack(cut)).float(), some, strict=True):
            if total is None:
                total = torch.zeros(len(logits), *pixels.shape[-2:], device=pixels.device)
            total[:, top : top + window[0], left : left + window[1]] += weight * logits
            weights[top : top + window[0], left : left + window[1]] += weight
    assert total is not None
    return (total / weights)[:, :height, :width]


def starts(length: int, window: int) -> list[int]:
    """Return where windows begin that cover `length` evenly and overlap by half or more; one where it is no longer."""
    steps = math.ceil((length - window) / max(1, window // 2))
    return [round(index * (length - window) / steps) for index in range(steps + 1)] if steps > 0 else [0]


def smooth_weight(window: tuple[int, int]) -> torch.Tensor:
    """Return `window`-sized weights, the squared sine of a pixel's place: 1 in the middle, near 0 at the border."""
    rows, columns = (torch.sin(math.pi * (torch.arange(side) + 0.5) / side).square() for side in window)
    return rows[:, None] * columns
