"""Images larger than a window, read by windows: where they lie, and which of them hold nothing."""

from itertools import product

import numpy as np

from hf_vicreg.modeling.channel_layout import ChannelFile

BLANK_DEVIATION = 0.02  # of a channel's range; below it in every channel and every sample, a window holds nothing
LOOK_SIDE = 128  # least side in pixels at which a window is looked at: on a coarser level small things fade
WHOLE_SIDE = 512  # longest side of a window that is looked at whole without such a level


def windows_of(height: int, width: int, window: int) -> list[tuple[int, int, int, int]]:
    """Return boxes (left, top, right, bottom) that cover an image, each of the window's size or the image's.

    They lie evenly spread; the last ones end at the border, and so overlap those before.
    """
    tops, lefts = (
        [round(place * (side - window) / max(1, -(-side // window) - 1)) for place in range(-(-side // window))]
        if side > window
        else [0]
        for side in (height, width)
    )
    return [(left, top, min(width, left + window), min(height, top + window)) for top, left in product(tops, lefts)]


def level_for(file: ChannelFile, reduction: float) -> tuple[int, float, float]:
    """Return the coarsest level that is at most so many times smaller, and its (height, width) factors."""
    height, width = file.size()
    best = (0, 1.0, 1.0)
    for level in range(1, len(file.levels)):
        own_height, own_width = file.size(level)
        factors = (height / own_height, width / own_width)
        if best[1] < min(factors) and max(factors) <= reduction * (1 + 1e-3):
            best = (level, *factors)
    return best


def box_at(box: tuple[int, int, int, int], factors: tuple[float, float], size: tuple[int, int]) -> tuple[int, ...]:
    """Return a box of the first level in pixels of a coarser one, of one pixel at least."""
    (row_factor, column_factor), (height, width) = factors, size
    left, top = min(width - 1, int(box[0] / column_factor)), min(height - 1, int(box[1] / row_factor))
    right, bottom = (round(one / factor) for one, factor in ((box[2], column_factor), (box[3], row_factor)))
    return left, top, min(width, max(left + 1, right)), min(height, max(top + 1, bottom))


def is_blank(file: ChannelFile, image: int, box: tuple[int, int, int, int], low: np.ndarray, high: np.ndarray) -> bool:
    """Return whether a window holds nothing: glass, sky, a black border.

    It is looked at on the coarsest level where it has `LOOK_SIDE` pixels a side; without such a level, in five samples
    a quarter as wide, or whole where it is small.

    Args:
        file: Where it lies.
        image: Which of the file's.
        box: The window, (left, top, right, bottom).
        low: Of each channel, the value that becomes 0.
        high: Of each channel, the value that becomes 1.
    """
    level, *factors = level_for(file, min(box[2] - box[0], box[3] - box[1]) / LOOK_SIDE)
    if level or max(box[2] - box[0], box[3] - box[1]) <= WHOLE_SIDE:
        looks = [box_at(box, (factors[0], factors[1]), file.size(level))]
    else:
        width, height = box[2] - box[0], box[3] - box[1]
        wide, high_ = max(1, width // 4), max(1, height // 4)
        places = [(0.5, 0.5), *product((0.25, 0.75), (0.25, 0.75))]
        corners = [(box[0] + int(x * width) - wide // 2, box[1] + int(y * height) - high_ // 2) for x, y in places]
        looks = [(left, top, left + wide, top + high_) for left, top in corners]
    for look in looks:
        pixels = file.read(image, level, (look[0], look[1], look[2], look[3])).astype(np.float32)
        if (pixels.std((0, 1)) > BLANK_DEVIATION * (high - low)).any():
            return False
    return True
