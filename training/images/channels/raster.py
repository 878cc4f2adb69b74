"""A part of an image of any channels, read when it is cropped: what a view is drawn of, as of Pillow's images."""

from typing import Any

import numpy as np
from PIL import Image

from hf_vicreg.modeling.channel_layout import ChannelFile
from hf_vicreg.training.images.decoding import unusable


class Raster:
    """Pixels of one level of one image; has the words of Pillow's images that views need.

    Attributes:
        width: In pixels, of that level.
        height: The same.
    """

    def __init__(
        self, file: ChannelFile, image: int = 0, level: int = 0, box: tuple[int, int, int, int] | None = None
    ):
        """Take `box` (left, top, right, bottom) in pixels of the level; default: all of it."""
        self.file, self.image, self.level = file, image, level
        self.left, self.top, right, bottom = box or (0, 0, *file.size(level)[::-1])
        self.width, self.height = right - self.left, bottom - self.top

    @classmethod
    def of(cls, pixels: np.ndarray) -> "Raster":
        """Return pixels `(height, width, channels)` in memory."""
        return cls(ChannelFile([pixels], "YXC", pixels.shape[2]))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height

    def crop(self, box: tuple[int, int, int, int], *, gaps: bool = False) -> np.ndarray:
        """Return pixels `(height, width, channels)` of (left, top, right, bottom); no others are read.

        With `gaps` they are NaN where there is no value; see `ChannelFile.read`.

        Raises:
            UnusableImage: They cannot be read.
        """
        left, top, right, bottom = box
        inside = (self.left + left, self.top + top, self.left + right, self.top + bottom)
        try:
            return self.file.read(self.image, self.level, inside, gaps=gaps)
        except Exception as error:  # of a library, on a broken file
            raise unusable(error, b"damaged inside") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all pixels `(height, width, channels)`."""
        pixels = self.crop((0, 0, self.width, self.height))
        return pixels if dtype is None else pixels.astype(dtype)

    def transform(
        self, size: tuple[int, int], method: Image.Transform, data: Any, resample: Image.Resampling
    ) -> "Raster":
        """Return the pixels transformed as Pillow does, by channel and in their own depth; outside is its least."""
        pixels = np.asarray(self)
        planes = []
        for plane in np.moveaxis(pixels, -1, 0):
            exact = plane if plane.dtype == np.uint8 else plane.astype(np.float32)
            image, least = Image.fromarray(np.ascontiguousarray(exact)), exact.min().item()  # 0 may mean something
            moved = np.asarray(image.transform(size, method, data, resample, fillcolor=least))
            planes.append(moved if pixels.dtype.kind == "f" else moved.round().astype(pixels.dtype))
        return Raster.of(np.stack(planes, axis=-1))


def resized(
    pixels: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """Return a part of an image at another size, resampled bilinearly as Pillow does: a channel at a time if not RGB.

    Args:
        pixels: `(height, width, channels)` of any depth.
        size: (width, height) in pixels.
        box: (left, top, right, bottom) of the part, in pixels; default: all.

    Returns:
        uint8 of uint8, float32 of anything else.
    """
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, box=box))
    planes = np.moveaxis(pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32), -1, 0)
    pictures = [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]
    return np.stack([np.asarray(one.resize(size, Image.Resampling.BILINEAR, box=box)) for one in pictures], axis=-1)


def as_picture(image: Any, low: Any = None, high: Any = None) -> Image.Image:
    """Return an image for people to look at: of a `Raster` three channels, from `low` to `high` or its extremes."""
    if not isinstance(image, Raster):
        return image
    pixels = np.asarray(image)[:, :, :3].astype(np.float32)
    low, high = (
        (pixels.min((0, 1)), pixels.max((0, 1))) if low is None else (low[: pixels.shape[2]], high[: pixels.shape[2]])
    )
    shown = ((pixels - low) / np.maximum(np.asarray(high) - low, 1e-12)).clip(0, 1) * 255
    shown = np.concatenate([shown, *[shown[:, :, -1:]] * (3 - shown.shape[2])], axis=2)  # grey and two channels
    return Image.fromarray(shown.round().astype(np.uint8))


def arrays_of(images: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return images as an image processor takes them, and what it has to be told of their axes."""
    if images and isinstance(images[0], Raster):
        return [np.asarray(one) for one in images], {"input_data_format": "channels_last"}
    return images, {}
