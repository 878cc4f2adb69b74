"""Colour operations of views, batched, on whatever device they are.

Each equals its counterpart in torchvision's `transforms.v2.functional` on floats to 2e-4 of the range [0, 1]
(torchvision rounds the grey weights to four digits), blur to 1e-5. Deviations: the jitter's four operations come in
one fixed order (brightness, contrast, saturation, hue) instead of a random one, so that a batch can be processed at
once; and a blur is cut off at three times its own sigma.

On a CPU a view becomes the same bits whatever it is batched with: an operation either leaves a view that it was not
drawn for exactly as it is, or is run on the views it was drawn for alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_vicreg.modeling.channel_pixels import scaled
from hf_vicreg.training.images.channels.science_views import NUM_COLOURS, add_noise, before_colours, drop_channels

# columns of the colour parameters
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE, BLUR_SIGMA, SOLARIZE = range(7)
NEUTRAL = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)  # what changes no bit
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow and torchvision
# Floats at a time on a CPU, one view of 224 pixels. The dozens of passes over them stay in the core's cache: several
# times faster than one pass after another over a batch. A GPU takes the whole batch.
CPU_CHUNK = 3 * 224 * 224


IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
Normalisation = tuple[Sequence[float], Sequence[float]]  # mean and deviation of each channel of pixels in [0, 1]
Ranges = tuple[Sequence[float], Sequence[float]]  # of each channel, the values that become 0 and 1


def finish_batch(
    batch: dict[str, Any],
    device: torch.device,
    normalisation: Normalisation = IMAGENET,
    ranges: Ranges | None = None,
) -> dict[str, Any]:
    """Return what `VicRegForPreTraining` takes of a batch of the loader: its views finished on the device.

    Captions are the other encoder's; an image with one view beside them has no axis of views.
    """
    images: dict[str, Any] = {}
    for name, crops, colours in (
        ("pixel_values", batch["views"], batch["colours"][:, :2]),
        ("local_pixel_values", batch.get("local_views"), batch["colours"][:, 2:]),
    ):
        if crops is not None:
            crops = crops.to(device, non_blocking=True)
            images[name] = finish_views(crops.flatten(0, 1), colours.flatten(0, 1), normalisation, ranges).view_as(
                crops
            )
    if "input_ids" in batch:
        if images["pixel_values"].shape[1] == 1:
            images["pixel_values"] = images["pixel_values"][:, 0]
        names = ("input_ids", "attention_mask")
        images["second_inputs"] = {name: batch[name].to(device, non_blocking=True) for name in names}
    return images


def placed_batch(
    batch: dict[str, Any],
    device: torch.device,
    normalisation: Normalisation,
    ranges: Ranges | None = None,
) -> dict[str, torch.Tensor]:
    """Return what `finish_batch` does, and where the views lie in their images, of an objective that asks."""
    return finish_batch(batch, device, normalisation, ranges) | {
        "geometry": batch["geometry"].to(device, non_blocking=True)
    }


def finish_views(
    crops: torch.Tensor,
    colours: torch.Tensor,
    normalisation: Normalisation = IMAGENET,
    ranges: Ranges | None = None,
) -> torch.Tensor:
    """Return views ready for the encoder: colour operations, then the image processor's normalisation.

    Args:
        crops: `(batch, channels, height, width)` uint8; with `ranges` of any depth.
        colours: `(batch, 7)` float32 on the CPU, as `ViewSampler` draws them; more with those of `science_views`.
        normalisation: The image processor's mean and deviation.
        ranges: Values of each channel that become 0 and 1; None: 0 and 255.

    Returns:
        `(batch, channels, height, width)` float32.
    """
    mean, std = (_constants(values, crops.device) for values in normalisation)
    views = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
    at_once = max(1, CPU_CHUNK // crops[0].numel()) if crops.device.type == "cpu" else len(crops)
    for images, own_crops, own_colours in zip(
        views.split(at_once), crops.split(at_once), colours.split(at_once), strict=True
    ):
        images.copy_(own_crops)
        if ranges is None:
            images.div_(255)
        else:
            images.copy_(scaled(images, *ranges))
        measured = own_colours[:, NUM_COLOURS:]
        if measured.shape[1]:
            before_colours(images, measured)
        _colour(images, own_colours[:, :NUM_COLOURS])
        if measured.shape[1]:
            add_noise(images, measured)
        images.sub_(mean).div_(std)
        if measured.shape[1]:
            drop_channels(images, measured)
    return views


def _constants(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """Return a number for each channel, `(channels, 1, 1)`."""
    return _sent(torch.tensor(values)[:, None, None], device)


def _sent(few: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a few numbers on the device. CUDA takes them at the call, MPS later: it alone is waited for."""
    return few.to(device, non_blocking=device.type != "mps")


def _colour(images: torch.Tensor, colours: torch.Tensor) -> None:
    """Run the operations in place on images `(batch, channels, height, width)` in [0, 1], as colours `(batch, 7)` say.

    Saturation, hue and grayscale are of RGB alone.
    """
    brightness, contrast, saturation, turns, grayscale, _, solarize = colours.to(images.device, non_blocking=True)[
        :, :, None, None, None
    ].unbind(1)
    drawn = colours != torch.tensor(NEUTRAL)
    needed = drawn.any(0).tolist()
    if any(needed[: SATURATION + 1]):
        images.mul_(brightness).clamp_(max=1)
        means, is_rgb = images.mean((2, 3), keepdim=True), images.shape[1] == 3
        # of other channels each keeps its own mean
        mean_luma = luma(means) if is_rgb else means
        images.mul_(contrast).add_(mean_luma.mul_(1 - contrast)).clamp_(0, 1)
        if is_rgb:
            gray = luma(images)
            images.mul_(saturation).add_(gray.mul_(1 - saturation)).clamp_(0, 1)
    if needed[HUE] and images.shape[1] == 3:
        _on_drawn(images, drawn[:, HUE], shift_hue, turns)
    if needed[GRAYSCALE] and images.shape[1] == 3:
        images.lerp_(luma(images), grayscale)  # 0 and 1 are exact
    if needed[BLUR_SIGMA]:
        _on_drawn(images, drawn[:, BLUR_SIGMA], blur, colours[:, BLUR_SIGMA])
    if needed[SOLARIZE]:
        # 1 - x where x is at least one half is the smaller of the two; 2 - x is never smaller than x
        torch.minimum(images, 2 - solarize - images, out=images)


def _on_drawn(
    images: torch.Tensor,
    drawn: torch.Tensor,
    operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    strengths: torch.Tensor,
) -> None:
    """Replace the images that an operation was drawn for, `(batch,)` bool, by what it makes of them."""
    if drawn.all():
        images.copy_(operation(images, strengths))
    else:
        rows = drawn.nonzero()[:, 0]
        own = _sent(rows, images.device)
        images[own] = operation(images[own], strengths[_sent(rows, strengths.device)])


def luma(images: torch.Tensor) -> torch.Tensor:
    """Return the grayscale `(batch, 1, height, width)` of `(batch, 3, height, width)`."""
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def shift_hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Return RGB images with their HSV hue turned.

    Without a mask or a selection, which cost a CPU many times the arithmetic that stands in for them.

    Args:
        images: `(batch, 3, height, width)` in [0, 1].
        turns: Broadcastable to `(batch, 1, height, width)`, in turns of the colour circle.
    """
    red, green, blue = images.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = torch.minimum(torch.minimum(red, green), blue).neg_().add_(value)
    # The hue in turns. It counts from the channel that is largest: the first of the three that no other exceeds.
    scale = chroma.clamp(min=1e-12).mul_(6).reciprocal_()
    not_red, not_green = (value - red).sign_(), (value - green).sign_()
    hue = torch.lerp((blue - red).mul_(scale).add_(1 / 3), (red - green).mul_(scale).add_(2 / 3), not_green)
    hue = torch.lerp((green - blue).mul_(scale), hue, not_red).add_(turns)
    # The closed form of HSV to RGB: channel = V - C * max(0, min(k, 4 - k, 1)), k = (n + 6 * hue) mod 6, n = 5, 3, 1.
    # With d = |k - 2| / 6, a distance to a whole number, that is V - C * (2 - 6 * d kept between 1/6 and 1/3).
    distance = hue + _constants([1 / 2, 1 / 6, -1 / 6], images.device)
    distance.sub_(distance.round()).abs_().clamp_(1 / 6, 1 / 3)
    return distance.mul_(6 * chroma).add_(value.sub_(chroma, alpha=2))


def blur(images: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Return images blurred by a Gaussian, reflected at the border and cut off at three times its sigma.

    Args:
        images: `(batch, channels, height, width)`.
        sigmas: `(batch,)` on the CPU, in pixels; 0 leaves an image as it is.
    """
    height, width = images.shape[2:]
    radii = (3 * sigmas).ceil()
    radius = min(int(radii.max()), height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (offsets / sigmas.clamp(min=1e-3)[:, None]) ** 2)
    # beyond an image's own radius the taps are zero: its result is the same beside an image with a larger one
    kernels *= offsets.abs() <= radii[:, None]
    kernels = _sent(kernels / kernels.sum(1, keepdim=True), images.device)
    # One padded image is one row of numbers. A tap along x is that row shifted by one, along y by a padded line;
    # what runs over the end of a line lands in the padding.
    padded = F.pad(images, [radius] * 4, mode="reflect")
    line = padded.shape[3]
    blurred = _weighted_shifts(_weighted_shifts(padded.flatten(2), kernels, 1), kernels, line)
    plane = blurred.shape[2]
    return blurred.as_strided(images.shape, (images.shape[1] * plane, plane, line, 1))


def _weighted_shifts(rows: torch.Tensor, kernels: torch.Tensor, stride: int) -> torch.Tensor:
    """Return the sum of rows `(batch, channels, numbers)` shifted by multiples of a stride, weighted by kernels."""
    length = rows.shape[2] - stride * (kernels.shape[1] - 1)
    taps = kernels[:, :, None, None].unbind(1)
    total = rows[..., :length] * taps[0]
    for tap, weight in enumerate(taps[1:], start=1):
        total.addcmul_(rows[..., tap * stride : tap * stride + length], weight)
    return total
