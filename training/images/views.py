"""Views of an image: a crop on the CPU, colour on the device.

A worker crops, resizes and flips one image at a time and draws the parameters of the colour operations; these then run
batched on the device (`colour.py`). All randomness comes from the generator handed in, so a view depends on its key
alone.
"""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hf_vicreg.training.images.channels.science_views import draw_measured, is_measured
from hf_vicreg.training.run.arguments import ViewsConfig

UNTURNED = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # Pillow's coefficients, output pixel to input pixel


class ViewSampler:
    """Draws one view: a uint8 crop and the parameters of its colour operations.

    Attributes:
        image_size: Of the view, (height, width) in pixels.
        crop_ratios: Smallest and largest crop, as shares of the image's area.
        view: Which of an image's views it draws, from 0 on; they may differ in blur and solarisation.
    """

    def __init__(self, config: ViewsConfig, image_size: tuple[int, int], crop_ratios: tuple[float, float], view: int):
        self.config, self._measured = config, is_measured(config)
        self.image_size = image_size
        self.crop_ratios = crop_ratios
        self.view = view

    @classmethod
    def of_views(cls, config: ViewsConfig, image_size: tuple[int, int]) -> "list[ViewSampler]":
        """Return a sampler for each view of an image: two global ones of `image_size`, then the local ones."""
        local = (config.local_crop_min_ratio, config.local_crop_max_ratio)
        side = config.local_image_size
        kinds = [(image_size, (config.crop_min_ratio, 1.0))] * 2 + [((side, side), local)] * config.num_local_views
        return [cls(config, *kind, view) for view, kind in enumerate(kinds)]

    def __call__(self, image: Image.Image, rng: random.Random) -> tuple[torch.Tensor, list[float]]:
        """Return a crop `(channels, height, width)` in the image's depth, uint8 of Pillow's, and its colours."""
        return self.draw(image, rng)[:2]

    def draw(self, image: Image.Image, rng: random.Random) -> tuple[torch.Tensor, list[float], list[float]]:
        """Return a crop as `__call__` does, its colour parameters and where it lies in the image.

        The last is a 2 x 3 matrix, row by row: from a place (x, y, 1) in the crop, in shares of its width and height,
        to the place in the image, in units of its longer side.
        """
        config = self.config
        turn: tuple[float, ...] = UNTURNED
        if self._is_affine:
            turn = self._draw_affine(image, rng)
            image = image.transform(image.size, Image.Transform.AFFINE, turn, Image.Resampling.BILINEAR)
        left, top, width, height = crop_box(image.width, image.height, self.crop_ratios, rng)
        # rows of pixels, channels last: the layout in which resizing of bytes is vectorised
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height)))).permute(2, 0, 1)
        quarters = 0
        if config.quarter_turn_probability and rng.random() < config.quarter_turn_probability:
            quarters = 1 + int(rng.random() * 3)
            pixels = pixels.rot90(quarters, (1, 2))
        if ((width, height) if quarters % 2 else (height, width)) != self.image_size:
            pixels = resized(pixels, self.image_size)
        flipped = rng.random() < config.flip_probability
        if flipped:
            pixels = pixels.flip(2)
        upended = bool(config.vertical_flip_probability) and rng.random() < config.vertical_flip_probability
        if upended:
            pixels = pixels.flip(1)
        colours = self._draw_colour(rng)
        if self._measured:
            colours += draw_measured(config, len(pixels), rng)
        shares = _shares(quarters, flipped, upended)
        return pixels.contiguous(), colours, _place((left, top, width, height), shares, turn, max(image.size))

    def reduction(self, width: int, height: int, rng: random.Random) -> int:
        """Return how many times smaller the image may be decoded: its crop then still has the view's pixels.

        Args:
            width: The image's, in pixels.
            height: The same.
            rng: A generator of the view's key, not the one that draws the view afterwards.
        """
        if self._is_affine:
            return 1
        _, _, crop_width, crop_height = crop_box(width, height, self.crop_ratios, rng)
        return max(1, min(crop_height // self.image_size[0], crop_width // self.image_size[1]))

    @property
    def _is_affine(self) -> bool:
        return bool(self.config.rotation_degrees or self.config.translate_ratio or self.config.zoom_ratio)

    def _draw_affine(self, image: Image.Image, rng: random.Random) -> tuple[float, ...]:
        """Pillow's coefficients, output pixel to input pixel, of a turn, zoom and shift about the centre."""
        config = self.config
        angle = math.radians(rng.uniform(-config.rotation_degrees, config.rotation_degrees))
        zoom = rng.uniform(1 - config.zoom_ratio, 1 + config.zoom_ratio)
        shift_x, shift_y = (
            rng.uniform(-config.translate_ratio, config.translate_ratio) * side for side in (image.width, image.height)
        )
        cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
        centre_x, centre_y = image.width / 2, image.height / 2
        from_x, from_y = centre_x + shift_x, centre_y + shift_y
        return (
            cosine,
            sine,
            centre_x - cosine * from_x - sine * from_y,
            -sine,
            cosine,
            centre_y + sine * from_x - cosine * from_y,
        )

    def _draw_colour(self, rng: random.Random) -> list[float]:
        config = self.config
        strengths = (config.brightness, config.contrast, config.saturation)
        factors = [rng.uniform(1 - strength, 1 + strength) for strength in strengths]
        hue = rng.uniform(-config.hue, config.hue)
        if rng.random() >= config.jitter_probability:
            factors, hue = [1.0, 1.0, 1.0], 0.0
        grayscale = float(rng.random() < config.grayscale_probability)
        sigma = rng.uniform(0.1, 2.0) * min(self.image_size) / 224
        sigma = sigma if rng.random() < of_view(config.blur_probability, self.view) else 0.0
        solarize = float(rng.random() < of_view(config.solarize_probability, self.view))
        return [*factors, hue, grayscale, sigma, solarize]


def _shares(quarters: int, flipped: bool, upended: bool) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the rows of x and y, from a place in a view to that in its box, in shares, before turns and flips."""
    across, down = (-1, 0, 1) if flipped else (1, 0, 0), (0, -1, 1) if upended else (0, 1, 0)
    for _ in range(quarters):  # a turn to the left takes (x, y) from (1 - y, x)
        across, down = (-down[0], -down[1], 1 - down[2]), across
    return across, down


def _place(
    box: tuple[int, int, int, int],
    shares: tuple[tuple[int, int, int], tuple[int, int, int]],
    turn: tuple[float, ...],
    longer_side: int,
) -> list[float]:
    """Return the matrix of `ViewSampler.draw` for a box (left, top, width, height) of an image that was turned."""
    left, top, width, height = box
    x, y = ([side * one for one in row] for side, row in zip((width, height), shares, strict=True))
    x[2], y[2] = x[2] + left, y[2] + top
    rows = []
    for across, down, shift in (turn[:3], turn[3:]):
        rows += [across * x[0] + down * y[0], across * x[1] + down * y[1], across * x[2] + down * y[2] + shift]
    return [one / longer_side for one in rows]


def resized(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return pixels `(channels, height, width)` at another size, in their own depth."""
    if pixels.dtype == torch.uint8:
        return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
    whole = F.interpolate(pixels[None].to(torch.float32), size, mode="bilinear", antialias=True)[0]
    return whole if pixels.dtype == torch.float32 else whole.round_().to(pixels.dtype)


def of_view(probability: float | tuple[float, float], view: int) -> float:
    """Return a view's own probability: of a pair, even views have the first one."""
    return probability[view % 2] if isinstance(probability, tuple) else probability


def crop_box(width: int, height: int, ratios: tuple[float, float], rng: random.Random) -> tuple[int, int, int, int]:
    """Return a random crop (left, top, width, height): share of the area within `ratios`, aspect from 3/4 to 4/3.

    Source: Szegedy et al. 2014 (arXiv 1409.4842), as in torchvision's `RandomResizedCrop`, with its fallback to a
    central crop for extreme shapes.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*ratios)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            # `randint` draws a number of times that depends on the range: an image decoded smaller, or stored smaller,
            # would not have the same view of the same picture
            left, top = (int(rng.random() * (spare + 1)) for spare in (width - crop_width, height - crop_height))
            return left, top, crop_width, crop_height
    crop_width = min(width, max(1, round(height * 4 / 3)))
    crop_height = min(height, max(1, round(width * 4 / 3)))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height
