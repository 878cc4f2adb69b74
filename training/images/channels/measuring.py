"""Normalisation by channel, measured on a sample of the images before training."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.channels.channel_source import ChannelSource
from hf_vicreg.training.images.channels.folders import without_blank
from hf_vicreg.training.images.decoding import UnusableImage
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.run.checks import fixed_bounds
from hf_vicreg.training.run.config import RunConfig

NUM_MEASURED = 64  # images
PIXELS_OF_EACH = 2**16  # on a grid over the image
VALUES_OF_EACH = 2**19  # of all channels: of more than 8 there are fewer pixels
PERCENTILES = (0.5, 99.5)
OF_PHOTOS = ([0.0] * 3, [255.0] * 3)
LARGEST_WINDOW = 1024  # pixels a side of one that is read for measuring


@dataclass(frozen=True)
class Measured:
    """What training and the image processor do to each channel: `((value - low) / (high - low) - mean) / std`.

    Attributes:
        channel_low: One number a channel; smaller values count as it.
        channel_high: The same; larger values count as it.
        image_mean: Of values between 0 and 1.
        image_std: Of the same.
    """

    channel_low: list[float]
    channel_high: list[float]
    image_mean: list[float]
    image_std: list[float]


def measure(source: ImageSource, kind: str, bounds: tuple[float, float] | None = None) -> Measured:
    """Measure up to 64 images, spread evenly over all, each at up to 65,536 pixels (of more than 8 channels fewer).

    Args:
        source: Of `Raster`s.
        kind: `percentile` (0.5 and 99.5 of each channel), `minmax` or `fixed`.
        bounds: Low and high of every channel, where they are fixed.

    Raises:
        InputError: No image can be read, or a channel has one value alone.
    """
    found = _samples(source)
    measured = Measured([], [], [], [])
    for channel in range(found[0].shape[1]):  # one after another: they may be many
        values = _values(found, channel)
        if kind == "fixed":
            assert bounds is not None
            low, high = bounds
        elif kind == "minmax":
            low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
        else:
            low, high = np.percentile(values, PERCENTILES) if len(values) else (np.inf, -np.inf)
        if not high > low:
            raise InputError(_alike(values, kind, low, f"channel {channel} of {source.name}", len(found)))
        scaled = ((values - low) / (high - low)).clip(0, 1)
        mean, std = (float(scaled.mean()), float(scaled.std())) if len(scaled) else (0.0, 0.0)
        measured.channel_low.append(float(low))
        measured.channel_high.append(float(high))
        measured.image_mean.append(mean)
        measured.image_std.append(std if std >= 1e-4 else 1.0)  # one that `fixed` makes constant stays finite
    return measured


def _alike(values: np.ndarray, kind: str, low: float, where: str, num_images: int) -> str:
    """Return the refusal of a channel whose low end is its high end."""
    if kind == "percentile" and len(values) and values.min() < values.max():
        return (
            f"`normalisation`: expected percentiles 0.5 and 99.5 that differ in {where}, found {low:g} for both in "
            f"{num_images} images of values from {values.min():g} to {values.max():g}; add --normalisation minmax, "
            "or fixed LOW HIGH."
        )
    return (
        f"`normalisation`: expected values that differ in {where}, found {f'{low:g}' if len(values) else 'none'} in "
        f"{num_images} images; leave the channel out, or add --normalisation fixed LOW HIGH."
    )


def measured_views(settings: dict[str, Any], config: RunConfig, source: ImageSource) -> dict[str, Any]:
    """Return a run's settings with the normalisation of its images among its views, where it is to be measured."""
    if config.normalisation_kind == "photo" or config.channel_ranges is not None:
        return settings
    found = measure(source, config.normalisation_kind, fixed_bounds(config.run.normalisation))
    return settings | {"views": asdict(found) | settings.get("views", {})}


def with_signal(source: ChannelSource, config: RunConfig) -> ChannelSource:
    """Return a source without its blank windows, before the others are measured.

    Of photographs they are told by the range of 8 bits, of others by the 0.5th to the 99.5th percentile of all
    windows: whatever the normalisation, and the same when a run is resumed.

    Raises:
        InputError: No image can be read, or all windows are blank.
    """
    if source.items is None:
        return source
    if config.normalisation_kind == "photo" and config.channel_ranges is None:
        return without_blank(source, *OF_PHOTOS)
    return without_empty(source)


def without_empty(source: ChannelSource) -> ChannelSource:
    """Return a source without the windows that are blank by the 0.5th to the 99.5th percentile of all.

    Raises:
        InputError: No image can be read, or all windows are blank.
    """
    found = _samples(source)
    every = (_values(found, channel) for channel in range(found[0].shape[1]))
    low, high = zip(*[np.percentile(one, PERCENTILES) if len(one) else (0, 0) for one in every], strict=True)
    return without_blank(source, list(low), list(high))


def _values(found: list[np.ndarray], channel: int) -> np.ndarray:
    """Return the values of a channel in float64; where there is none, NaN, they are left out."""
    values = np.concatenate([one[:, channel] for one in found]).astype(np.float64)
    return values[~np.isnan(values)]


def _samples(source: ImageSource) -> list[np.ndarray]:
    """Return values `(pixels, channels)` of each measured image that can be read.

    Raises:
        InputError: None can.
    """
    found, refused = [], None
    for index in source._spread(NUM_MEASURED):
        try:
            found.append(_sample(source.read_or_raise(index)))
        except UnusableImage as error:
            refused = refused or (index, error)
    if not found:
        assert refused is not None
        name, reason = source.describe(refused[0]), str(refused[1])
        raise InputError(f"`normalisation`: expected images to measure in {source.name}; {name}: {reason}.")
    return found


def _sample(raster: Any) -> np.ndarray:
    """Return values `(pixels, channels)` of an image, on a grid over it; of a huge one over its middle."""
    left, top = (max(0, (side - LARGEST_WINDOW) // 2) for side in raster.size)
    pixels = raster.crop(
        (left, top, min(raster.width, left + LARGEST_WINDOW), min(raster.height, top + LARGEST_WINDOW)),
        gaps=True,
    )
    wanted = min(PIXELS_OF_EACH, VALUES_OF_EACH // pixels.shape[2])
    step = max(1, int(np.ceil((pixels.shape[0] * pixels.shape[1] / wanted) ** 0.5)))
    return pixels[::step, ::step].reshape(-1, pixels.shape[2]).copy()  # the rest of the pixels can go
