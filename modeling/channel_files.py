"""Image files of science, of any number of channels and any depth: the one reading, of training and the processors.

TIFF with its axes, pages and pyramid (tifffile, imagecodecs), DICOM (pydicom), OME-Zarr (zarr), NumPy's `.npy`, PNG of
16 bits, and what Pillow opens. A library is asked for when a file needs it.
"""

import importlib
import os
import weakref
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from .channel_layout import ChannelFile, UnreadableChannels, axes_of_array
from .rgb_image import orientation_of

TIFF_STARTS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
PNG_START, NPY_START = b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
GDAL_NODATA = 42113  # a TIFF's tag
PALETTE = 3  # TIFF's photometric interpretation
GREY = {
    "1": "L",
    "L": "L",
    "LA": "L",
    "La": "L",
    "I": "I",
    "F": "F",
}  # Pillow's modes of one channel, as they are read


def open_channels(
    file: str | bytes,
    num_channels: int,
    pages: str | None = None,
    *,
    lazy: bool = False,
    max_pixels: int | None = None,
) -> ChannelFile:
    """Return a file's images of so many channels.

    Args:
        file: A path, or an encoded image.
        num_channels: That each image shall have.
        pages: What the pages of a file are, `channels` or `images`; None tells it from the number of channels.
        lazy: Read later, and only what is asked for; the file stays open. Else all is read now.
        max_pixels: Of a TIFF that is read now: a larger one is refused before it is decoded.

    Raises:
        UnreadableChannels: Other channels, axes that cannot be told, no or too many pixels, or a library that is not
            installed.
        Exception: What a library raises on a broken file.
    """
    if isinstance(file, str) and os.path.isdir(file):
        return ChannelFile(*_zarr(file), num_channels, pages)
    opened: Any = BytesIO(file) if isinstance(file, bytes) else file
    start = file[:132] if isinstance(file, bytes) else _beginning(file)
    if start.startswith(TIFF_STARTS):
        return _tiff(opened, num_channels, pages, lazy, max_pixels)
    if start.startswith(NPY_START):
        array = np.load(opened, mmap_mode="r" if lazy and isinstance(file, str) else None, allow_pickle=False)
        return ChannelFile([array], axes_of_array(array.shape, num_channels), num_channels, pages)
    if start[128:] == b"DICM":
        frames = _Frames(opened)
        return ChannelFile([frames], "QYXS"[: len(frames.shape)], num_channels, pages)
    if start.startswith(PNG_START) and start[24] == 16 and start[25] != 0:  # Pillow would keep 8 bits of colours
        array = _library("imagecodecs").png_decode(_contents(file))
        return ChannelFile([array], "YXS"[: array.ndim], num_channels, pages, alpha=start[25] & 4 > 0)
    return _picture(opened, num_channels, pages)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnreadableChannels(
            "library", f"needs the package {name}, which is not installed: pip install 'hf-vicreg[science]'"
        ) from error


def _beginning(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(132)


def _contents(file: str | bytes) -> bytes:
    if isinstance(file, bytes):
        return file
    with open(file, "rb") as opened:
        return opened.read()


def _picture(file: str | BinaryIO, num_channels: int, pages: str | None) -> ChannelFile:
    with Image.open(file) as opened:
        return channels_of_picture(opened, num_channels, pages)


def channels_of_picture(opened: Image.Image, num_channels: int, pages: str | None = None) -> ChannelFile:
    """What Pillow opens, upright: grey as it is, else RGB, with its transparency where 4 channels are wanted."""
    opened.load()
    image: Image.Image = ImageOps.exif_transpose(opened) if orientation_of(opened) > 1 else opened
    if image.mode in GREY:
        image = image if image.mode == GREY[image.mode] else image.convert(GREY[image.mode])
    elif not image.mode.startswith("I;16"):
        image = image.convert("RGBA" if "A" in image.mode or "transparency" in image.info else "RGB")
    array = np.array(image)
    return ChannelFile([array], "YXS"[: array.ndim], num_channels, pages, alpha=array.shape[2:] == (4,))


def refuse_larger(height: int, width: int, max_pixels: int | None) -> None:
    """Raise UnreadableChannels for an image of more pixels than are read at once."""
    if max_pixels is not None and height * width > max_pixels:
        raise UnreadableChannels(
            "too large",
            f"{width}x{height} pixels refused, at most {max_pixels:,} are read at once; store it by windows: "
            "hf-vicreg prepare IMAGES OUT --num_channels N --window 1024",
        )


def _tiff(
    file: str | BinaryIO, num_channels: int, pages: str | None, lazy: bool, max_pixels: int | None
) -> ChannelFile:
    """The first series of a TIFF: in OME's and ImageJ's files the image, in others all pages of one size."""
    tifffile = _library("tifffile")
    opened = tifffile.TiffFile(file)
    try:
        series = opened.series[0]
        page = series.keyframe
        if page.photometric == PALETTE:
            return _picture(file, num_channels, pages)
        alpha = bool(page.extrasamples) and int(page.extrasamples[-1]) in (1, 2)
        if lazy:
            zarr = _library("zarr")
            levels = [zarr.open(series.aszarr(level=level), mode="r") for level in range(len(series.levels))]
        else:
            refuse_larger(page.imagelength, page.imagewidth, max_pixels)
            levels = [series.asarray()]
        if levels[0].ndim != len(series.axes) or not {"Y", "X"} <= set(series.axes):
            raise UnreadableChannels("axes", f"the order of axes {series.axes} {levels[0].shape} cannot be told")
        inverted = page.photometric == 0
        found = ChannelFile(levels, _lettered(series.axes), num_channels, pages, alpha=alpha, inverted=inverted)
        found.nodata = _nodata(page)
        if lazy:
            weakref.finalize(found, opened.close)
        return found
    except BaseException:
        opened.close()
        raise
    finally:
        if not lazy:
            opened.close()


def _nodata(page: Any) -> float | None:
    """Return the number that GDAL wrote for no value, None where it wrote none; a text, so that NaN can be said."""
    tag = page.tags.get(GDAL_NODATA)
    try:
        return None if tag is None else float(tag.value)
    except (TypeError, ValueError):
        return None


def _lettered(axes: str) -> str:
    """Return axes with a letter of its own for each of those that share one."""
    return "".join(axis if axis not in axes[:place] else chr(ord("a") + place) for place, axis in enumerate(axes))


def _zarr(path: str) -> tuple[list[Any], str]:
    """The levels and axes of an OME-Zarr, version 0.1 to 0.5."""
    zarr = _library("zarr")
    try:
        group = zarr.open_group(path, mode="r")
        attributes = dict(group.attrs)
        scales = (attributes.get("ome") or attributes)["multiscales"][0]
        levels = [group[one["path"]] for one in scales["datasets"]]
    except (KeyError, IndexError, TypeError, FileNotFoundError, ValueError) as error:
        raise UnreadableChannels(
            "no multiscales", "a Zarr without `multiscales`, which say what its arrays are; store it as OME-Zarr"
        ) from error
    axes = [one if isinstance(one, str) else one["name"] for one in scales.get("axes", "tczyx")]
    letters = _lettered("".join(one[0].upper() for one in axes))
    if len(letters) != levels[0].ndim or not {"Y", "X"} <= set(letters):
        raise UnreadableChannels("axes", f"the order of axes {axes} of an array {levels[0].shape} cannot be told")
    return levels, letters


class _Frames:
    """The frames of a DICOM file, `(frames, rows, columns)` and samples for colours, each read when asked for.

    Values are as DICOM's pixel transformations say (PS3.3 C.11.1 and C.11.2): rescaled by slope and intercept; of
    values without a unit the first window is taken, from 0 to 1; 0 is black; colours are RGB.
    """

    def __init__(self, file: str | BinaryIO):
        pydicom = _library("pydicom")
        self.pixels = importlib.import_module("pydicom.pixels")
        self.data = pydicom.dcmread(file)
        if "PixelData" not in self.data and "FloatPixelData" not in self.data:
            raise UnreadableChannels("no pixels", "a DICOM file without pixels")
        first = self._frame(0)
        self.shape = (int(self.data.get("NumberOfFrames") or 1), *first.shape)
        self.dtype, self.ndim = first.dtype, 1 + first.ndim

    def __getitem__(self, where: tuple[Any, ...]) -> np.ndarray:
        frames = range(self.shape[0])[where[0]]
        if isinstance(frames, int):
            return self._frame(frames)[where[1:]]
        return np.stack([self._frame(one)[where[1:]] for one in frames])

    def _frame(self, index: int) -> np.ndarray:
        data = self.data
        stored = self.pixels.pixel_array(data, index=index)  # colours come as RGB
        kind = data.get("PhotometricInterpretation")
        if kind == "PALETTE COLOR":
            return self.pixels.apply_color_lut(stored, data)
        if stored.ndim == 3:
            return stored
        rescaling = self._part("PixelValueTransformationSequence", index)
        slope, intercept = (
            default if rescaling.get(name) in (None, "") else float(rescaling.get(name))
            for name, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
        )
        values = stored if (slope, intercept) == (1, 0) else (stored * slope + intercept).astype(np.float32)
        window = self._window(index)
        if window is not None:
            centre, width = window
            values = ((values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5).clip(0, 1).astype(np.float32)
            return 1 - values if kind == "MONOCHROME1" else values
        if kind == "MONOCHROME1":  # the smallest and the largest that can be stored change places
            bits, signed = int(data.BitsStored), bool(data.PixelRepresentation)
            total = -1 if signed else 2**bits - 1
            values = (2 * intercept + total * slope - values).astype(values.dtype)
        return values

    def _part(self, sequence: str, index: int) -> Any:
        """Return where a frame's values of a kind stand: its own part, that of all frames, or the file (C.7.6.16)."""
        own = (self.data.get("PerFrameFunctionalGroupsSequence") or [])[index : index + 1]
        for groups in (*own, *(self.data.get("SharedFunctionalGroupsSequence") or [])[:1]):
            if groups.get(sequence):
                return groups.get(sequence)[0]
        return self.data

    def _window(self, index: int) -> tuple[float, float] | None:
        """Return centre and width of the first window; none where values have a unit, such as Hounsfield's."""
        unit = self._part("PixelValueTransformationSequence", index).get("RescaleType") or "US"
        data = self._part("FrameVOILUTSequence", index)
        united = unit != "US" or self.data.get("Modality") in ("CT", "PT", "NM")
        if united or not data.get("WindowWidth") or data.get("WindowCenter") is None:
            return None
        found = [data.WindowCenter, data.WindowWidth]
        centre, width = (float(one[0] if hasattr(one, "__len__") else one) for one in found)
        return centre, width
