"""Pictures for a Space whose owner has given none: patterns, drawn, the same for everybody."""

import numpy as np
from PIL import Image

SIDE = 160  # in pixels
COLOURS = ((31, 119, 180), (230, 159, 0), (0, 158, 115), (204, 121, 167))  # which colour-blind people tell apart
GROUNDS = ((245, 244, 238), (38, 40, 46))
KINDS = ("stripes", "checks", "dots", "rings", "blobs", "noise")


def drawn_pictures() -> list[Image.Image]:
    """Return 24 RGB pictures: of each kind of pattern, one in each colour."""
    return [_drawn(kind, number) for kind in KINDS for number in range(len(COLOURS))]


def _drawn(kind: str, number: int) -> Image.Image:
    generator = np.random.default_rng([KINDS.index(kind), number])
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    turn = generator.uniform(0, np.pi)
    along, across = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    count = generator.uniform(3, 7)
    waves, others = np.sin(2 * np.pi * count * along), np.sin(2 * np.pi * count * across)
    if kind == "stripes":
        shares = waves > 0
    elif kind == "checks":
        shares = waves * others > 0
    elif kind == "dots":
        shares = waves + others > 1
    elif kind == "rings":
        middle = generator.uniform(0.3, 0.7, 2)
        shares = np.sin(2 * np.pi * count * np.hypot(x - middle[0], y - middle[1])) > 0
    elif kind == "blobs":
        places = generator.uniform(0.1, 0.9, (5, 2))
        shares = sum(np.exp(-80 * ((x - a) ** 2 + (y - b) ** 2)) for a, b in places)
    else:
        shares = generator.random((SIDE, SIDE))
    part = np.clip(np.asarray(shares, float), 0, 1)[..., None]
    ground = np.array(GROUNDS[number % 2])
    return Image.fromarray((ground + part * (np.array(COLOURS[number]) - ground)).round().astype(np.uint8))
