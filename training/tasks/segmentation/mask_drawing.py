"""Masks over images."""

import numpy as np
from PIL import Image, ImageColor

from hf_vicreg.training.tasks.detection.box_drawing import COLOURS
from hf_vicreg.training.tasks.segmentation.masks import IGNORED

OPACITY = 0.45


def draw_mask(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Return an image with a colour over each pixel by its number; 0 and `IGNORED` stay as they are.

    Args:
        image: RGB.
        mask: `(height, width)` class indices.
    """
    palette = np.array([ImageColor.getrgb(colour) for colour in COLOURS], dtype=np.float32)
    pixels = np.array(image.convert("RGB"), dtype=np.float32)
    shown = (mask != 0) & (mask != IGNORED)
    pixels[shown] = (1 - OPACITY) * pixels[shown] + OPACITY * palette[(mask[shown] - 1) % len(palette)]
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_objects(image: Image.Image, objects: np.ndarray) -> Image.Image:
    """Return an image with a colour over each object, numbered from 1 on: neighbours in number differ."""
    return draw_mask(image, np.where(objects > 0, (objects - 1) % len(COLOURS) + 1, 0))
