"""Views of an image: a crop on the CPU, colour on the device.

A worker crops, resizes and flips one image at a time and draws the parameters of the colour operations; these then run
batched on the device. All randomness comes from the generator handed in, so a view depends on its key alone.

Deviations from torchvision's `ColorJitter`: the four operations come in one fixed order (brightness, contrast,
saturation, hue) instead of a random one, so that a batch can be processed at once.
"""

import math
import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_vicreg.training.config import ViewsConfig

# columns of the colour parameters
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE, BLUR_SIGMA, SOLARIZE = range(7)
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow and torchvision


class ViewSampler:
    """Draws one view: a uint8 crop and the parameters of its colour operations.

    Attributes:
        image_size: Of the view, (height, width) in pixels.
        crop_ratios: Smallest and largest crop, as shares of the image's area.
    """

    def __init__(self, config: ViewsConfig, image_size: tuple[int, int], crop_ratios: tuple[float, float]):
        self.config = config
        self.image_size = image_size
        self.crop_ratios = crop_ratios

    @classmethod
    def of_views(cls, config: ViewsConfig, image_size: tuple[int, int]) -> "list[ViewSampler]":
        """Return a sampler for each view of an image: two global ones of `image_size`, then the local ones."""
        local = (config.local_crop_min_ratio, config.local_crop_max_ratio)
        side = config.local_image_size
        return [cls(config, image_size, (config.crop_min_ratio, 1.0))] * 2 + [
            cls(config, (side, side), local)
        ] * config.num_local_views

    def __call__(self, image: Image.Image, rng: random.Random) -> tuple[torch.Tensor, list[float]]:
        """Return a crop `(3, height, width)` uint8 and its colour parameters."""
        config = self.config
        if config.rotation_degrees or config.translate_ratio or config.zoom_ratio:
            image = image.transform(
                image.size, Image.Transform.AFFINE, self._draw_affine(image, rng), Image.Resampling.BILINEAR
            )
        left, top, width, height = crop_box(image.width, image.height, self.crop_ratios, rng)
        pixels = torch.from_numpy(np.array(image)[top : top + height, left : left + width]).permute(2, 0, 1)
        if (height, width) != self.image_size:
            pixels = F.interpolate(pixels[None], self.image_size, mode="bilinear", antialias=True)[0]
        if rng.random() < config.flip_probability:
            pixels = pixels.flip(2)
        return pixels.contiguous(), self._draw_colour(rng)

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
        sigma = sigma if rng.random() < config.blur_probability else 0.0
        solarize = float(rng.random() < config.solarize_probability)
        return [*factors, hue, grayscale, sigma, solarize]


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
            left, top = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
            return left, top, crop_width, crop_height
    crop_width = min(width, max(1, round(height * 4 / 3)))
    crop_height = min(height, max(1, round(width * 4 / 3)))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def finish_batch(batch: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Return what `VicRegForPreTraining` takes of a batch of the loader: its views finished on the device."""
    images = {}
    for name, crops, colours in (
        ("pixel_values", batch["views"], batch["colours"][:, :2]),
        ("local_pixel_values", batch.get("local_views"), batch["colours"][:, 2:]),
    ):
        if crops is not None:
            crops = crops.to(device, non_blocking=True)
            images[name] = finish_views(crops.flatten(0, 1), colours.flatten(0, 1)).view_as(crops)
    return images


def finish_views(crops: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Return views ready for the encoder: colour operations, then the image processor's normalisation.

    Args:
        crops: `(batch, 3, height, width)` uint8.
        colours: `(batch, 7)` float32, as `ViewSampler` draws them.

    Returns:
        `(batch, 3, height, width)` float32.
    """
    images = crops.to(torch.float32) / 255
    each = colours.to(images.device)[:, :, None, None, None].unbind(1)
    images = (images * each[BRIGHTNESS]).clamp(0, 1)
    mean_luma = luma(images).mean((2, 3), keepdim=True)
    images = (mean_luma + (images - mean_luma) * each[CONTRAST]).clamp(0, 1)
    gray = luma(images)
    images = (gray + (images - gray) * each[SATURATION]).clamp(0, 1)
    if colours[:, HUE].any():
        images = shift_hue(images, each[HUE])
    images = torch.where(each[GRAYSCALE] > 0, luma(images), images)
    if colours[:, BLUR_SIGMA].any():
        images = blur(images, colours[:, BLUR_SIGMA].to(images.device))
    images = torch.where((each[SOLARIZE] > 0) & (images >= 0.5), 1 - images, images)
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None]
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return (images - mean) / std


def luma(images: torch.Tensor) -> torch.Tensor:
    """Return the grayscale `(batch, 1, height, width)` of `(batch, 3, height, width)`."""
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device)
    return torch.einsum("bchw,c->bhw", images, weights)[:, None]


def shift_hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Return RGB images with their HSV hue turned.

    Args:
        images: `(batch, 3, height, width)` in [0, 1].
        turns: Broadcastable to `(batch, 1, height, width)`, in turns of the colour circle.
    """
    value, chroma_low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - chroma_low
    safe = chroma.clamp(min=1e-12)
    red, green, blue = images.split(1, dim=1)
    sector = torch.where(
        red == value,
        (green - blue) / safe,
        torch.where(green == value, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sector = sector + 6 * turns
    # the closed form of HSV to RGB: channel = V - C * max(0, min(k, 4 - k, 1)), k = (n + hue / 60 degrees) mod 6
    shifts = torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]
    place = (shifts + sector) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def blur(images: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Return images blurred by a Gaussian, each with its own sigma in pixels; 0 leaves an image as it is.

    Separable, reflected at the border, cut off at three times the largest sigma, 2 pixels at 224 pixels of size.
    """
    batch, channels, height, width = images.shape
    radius = max(1, min(math.ceil(6 * min(height, width) / 224), min(height, width) - 1))
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernels = torch.exp(-0.5 * (offsets / sigmas.clamp(min=1e-3)[:, None]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    planes = F.pad(images, [radius] * 4, mode="reflect").reshape(1, batch * channels, height + 2 * radius, -1)
    planes = F.conv2d(planes, kernels[:, None, None, :], groups=batch * channels)
    planes = F.conv2d(planes, kernels[:, None, :, None], groups=batch * channels)
    return torch.where((sigmas > 0)[:, None, None, None], planes.view_as(images), images)
