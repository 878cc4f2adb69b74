"""From the axes of a stored array to images of a given number of channels: what is a channel, what an image."""

import importlib
import math
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np

CHANNEL_AXES = "CS"  # tifffile's and OME's letters: channels, and the samples of a pixel
ON_TORCH = ("uint8", "uint16", "int16", "float32")  # what pixels stay in; others become the last, or one of these
EXACT = {"bool": "uint8", "int8": "int16"}


class UnreadableChannels(ValueError):  # noqa: N818 - as training's `UnusableImage`, not always an error
    """A file that holds no image of the wanted channels; its text says why and what to do.

    Attributes:
        kind: In one or two words, for counting.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


@dataclass
class ChannelFile:
    """The images of one file, read where they are asked for.

    Attributes:
        levels: Arrays of the file's axes, or what can be sliced like them: the whole, then each coarser level of a
            pyramid.
        axes: A letter for each axis: Y and X, C and S for channels, others for pages.
        num_channels: That each image shall have.
        pages: `channels` or `images`, what pages are; None tells it from the number of channels.
        alpha: Whether the last sample may be left out, being transparency.
        inverted: Whether 0 is white.
        nodata: The value that stands for none, where there is one.
        further: Levels of the images at other positions, of the same shapes; they are images of their own.
    """

    levels: list[Any]
    axes: str
    num_channels: int
    pages: str | None = None
    alpha: bool = False
    inverted: bool = False
    nodata: float | None = None
    further: list[list[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Find out what pages are.

        Raises:
            UnreadableChannels: Other channels than wanted, or values that are no real numbers.
        """
        lengths = dict(zip(self.axes, self.levels[0].shape, strict=True))
        # a level of fewer planes or times is none of the same pages
        of_pages = [place for place, axis in enumerate(self.axes) if axis not in "YX"]
        kept = [all(one.shape[at] == self.levels[0].shape[at] for at in of_pages) for one in self.levels]
        self.levels, *self.further = (list(compress(one, kept)) for one in (self.levels, *self.further))
        channels = math.prod(length for axis, length in lengths.items() if axis in CHANNEL_AXES)
        stacked = math.prod(length for axis, length in lengths.items() if axis not in CHANNEL_AXES + "YX")
        wanted, self.alpha = self.num_channels, self.alpha and channels == self.num_channels + 1
        channels -= self.alpha
        as_pages = self.pages or ("images" if channels == wanted else "channels")
        found = channels if as_pages == "images" else channels * stacked
        if found != wanted:
            pages = f" and {stacked} pages" if stacked > 1 else ""
            remedy = f"--model.num_channels {found}"
            if pages and self.pages is None:
                remedy = f"--model.num_channels {found}, or {channels} for pages that are images of their own"
            raise UnreadableChannels(
                "channels", f"{channels} channel(s){pages} where {wanted} are wanted; train with {remedy}"
            )
        if np.dtype(self.levels[0].dtype).kind not in "buif":
            raise UnreadableChannels("depth", f"values of type {self.levels[0].dtype} are no intensities")
        self.images_each = stacked if as_pages == "images" else 1
        self.num_images = self.images_each * (1 + len(self.further))

    @property
    def is_decoded(self) -> bool:
        """Whether all pixels lie in memory: those of a file that cannot be read by parts."""
        return type(self.levels[0]) is np.ndarray

    def size(self, level: int = 0) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        shape = self.levels[level].shape
        return int(shape[self.axes.index("Y")]), int(shape[self.axes.index("X")])

    def read(
        self, image: int = 0, level: int = 0, box: tuple[int, int, int, int] | None = None, *, gaps: bool = False
    ) -> np.ndarray:
        """Return pixels `(height, width, channels)` in the file's depth; numbers that are none, such as NaN, are 0.

        Args:
            image: Which of the file's.
            level: Of the pyramid.
            box: (left, top, right, bottom) in that level's pixels; default: all. What lies outside is not read.
            gaps: Return NaN, in float32, where there is no value: NaN, infinite or `nodata`. For statistics alone.
        """
        position, image = divmod(image, self.images_each)
        array = [self.levels, *self.further][position][level]
        left, top, right, bottom = box or (0, 0, *self.size(level)[::-1])
        of_pages = [axis for axis in self.axes if axis not in CHANNEL_AXES + "YX"] if self.images_each > 1 else []
        lengths = [array.shape[self.axes.index(axis)] for axis in of_pages]
        place = dict(zip(of_pages, np.unravel_index(image, lengths), strict=True)) if of_pages else {}
        where: dict[str, Any] = {"Y": slice(top, bottom), "X": slice(left, right)} | {
            axis: int(index) for axis, index in place.items()
        }
        pixels = np.asarray(array[tuple(where.get(axis, slice(None)) for axis in self.axes)])
        kept = [axis for axis in self.axes if axis not in place]
        pixels = np.moveaxis(pixels, [kept.index("Y"), kept.index("X")], [0, 1])
        pixels = pixels.reshape(*pixels.shape[:2], -1)[:, :, : self.num_channels]
        missing = ~np.isfinite(pixels) if gaps else np.zeros((), bool)
        if gaps and self.nodata is not None:
            with np.errstate(over="ignore"):  # a number that the pixels' type does not hold
                missing |= pixels == self.nodata
        if self.inverted and pixels.dtype.kind in "bui":
            pixels = np.invert(pixels)  # the smallest and the largest that can be stored change places
        found = plain(pixels)
        return np.where(missing, np.float32(np.nan), found) if missing.any() else found


def plain(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as uint8, uint16, int16 or float32; NaN and infinities are 0."""
    name = pixels.dtype.name
    if name not in ON_TORCH:
        pixels = pixels.astype(EXACT.get(name, "float32"))
    elif not pixels.dtype.isnative:
        pixels = pixels.astype(name)
    return np.nan_to_num(pixels, nan=0, posinf=0, neginf=0) if pixels.dtype.kind == "f" else pixels


def axes_of_array(shape: tuple[int, ...], num_channels: int) -> str:
    """Return the axes of an array without a name for them, told from where the channels are.

    Raises:
        UnreadableChannels: They cannot be told.
    """
    if len(shape) == 2:
        return "YX"
    if len(shape) in (3, 4):
        pages = "Q" * (len(shape) - 3)
        first, last = shape[-3] == num_channels, shape[-1] == num_channels
        if first and last and num_channels > 1:
            raise UnreadableChannels(
                "axes",
                f"the order of axes {list(shape)} cannot be told, {num_channels} channels may come first or last; "
                "store TIFF with axes in its metadata",
            )
        if last and not first:
            return pages + "YXC"
        if first:
            return pages + "CYX"
        if num_channels == 1 and not pages:
            return "QYX"
        # as most store it: the shortest axis is the channels'
        return pages + ("CYX" if shape[-3] < shape[-1] else "YXC")
    raise UnreadableChannels("axes", f"the order of axes {list(shape)} cannot be told, 2 to 4 axes are known")


def refuse_larger(height: int, width: int, max_pixels: int | None) -> None:
    """Raise UnreadableChannels for an image of more pixels than are read at once."""
    if max_pixels is not None and height * width > max_pixels:
        raise UnreadableChannels(
            "too large",
            f"{width}x{height} pixels refused, at most {max_pixels:,} are read at once; store it by windows: "
            "hf-vicreg prepare IMAGES OUT --num_channels N --window 1024",
        )


def library(name: str) -> Any:
    """Return a library of the extra `science`.

    Raises:
        UnreadableChannels: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnreadableChannels(
            "library", f"needs the package {name}, which is not installed: pip install 'hf-vicreg[science]'"
        ) from error
