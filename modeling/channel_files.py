"""Image files of science, of any number of channels and any depth: the one reading, of training and the processors.

TIFF with its axes, pages and pyramid (tifffile, imagecodecs), DICOM (pydicom), OME-Zarr (zarr), NumPy's `.npy`, PNG of
16 bits, and what Pillow opens. A library is asked for when a file needs it.
"""

import os
import struct
import weakref
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from .channel_layout import ChannelFile, UnreadableChannels, axes_of_array, library, refuse_larger
from .dicom_frames import DicomFrames
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
        max_pixels: Of an image that is read now: a larger one is refused before it is decoded.

    Raises:
        UnreadableChannels: Other channels, axes that cannot be told, no or too many pixels, or a library that is not
            installed.
        Exception: What a library raises on a broken file.
    """
    if isinstance(file, str) and os.path.isdir(file):
        return _zarr(file, num_channels, pages)
    opened: Any = BytesIO(file) if isinstance(file, bytes) else file
    start = file[:132] if isinstance(file, bytes) else _beginning(file)
    if start.startswith(TIFF_STARTS):
        return _tiff(opened, num_channels, pages, lazy, max_pixels)
    if start.startswith(NPY_START):
        array = np.load(opened, mmap_mode="c" if isinstance(file, str) else None, allow_pickle=False)
        found = ChannelFile([array], axes_of_array(array.shape, num_channels), num_channels, pages)
        refuse_larger(*found.size(), None if lazy else max_pixels)
        return found
    if start[128:] == b"DICM":
        frames = DicomFrames(opened, None if lazy else max_pixels)
        return ChannelFile([frames], "QYXS"[: len(frames.shape)], num_channels, pages, nodata=frames.nodata)
    if start.startswith(PNG_START) and start[24] == 16 and start[25] != 0:  # Pillow would keep 8 bits of colours
        width, height = struct.unpack(">II", start[16:24])
        refuse_larger(height, width, None if lazy else max_pixels)
        array = library("imagecodecs").png_decode(_contents(file))
        return ChannelFile([array], "YXS"[: array.ndim], num_channels, pages, alpha=start[25] & 4 > 0)
    return _picture(opened, num_channels, pages, None if lazy else max_pixels)


def _beginning(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(132)


def _contents(file: str | bytes) -> bytes:
    if isinstance(file, bytes):
        return file
    with open(file, "rb") as opened:
        return opened.read()


def _picture(file: str | BinaryIO, num_channels: int, pages: str | None, max_pixels: int | None) -> ChannelFile:
    with Image.open(file) as opened:
        refuse_larger(opened.height, opened.width, max_pixels)
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


def _tiff(
    file: str | BinaryIO, num_channels: int, pages: str | None, lazy: bool, max_pixels: int | None
) -> ChannelFile:
    """The first series of a TIFF, all pages of one size; of OME's files those of further positions as well."""
    tifffile = library("tifffile")
    opened = tifffile.TiffFile(file)
    try:
        series = opened.series[0]
        page = series.keyframe
        if page.photometric == PALETTE:
            return _picture(file, num_channels, pages, None if lazy else max_pixels)
        alpha = bool(page.extrasamples) and int(page.extrasamples[-1]) in (1, 2)
        alike = [one for one in opened.series if (one.axes, one.shape) == (series.axes, series.shape)]
        positions = alike if opened.is_ome else [series]
        if lazy:
            levels = [_levels(one) for one in positions]
        else:
            refuse_larger(page.imagelength, page.imagewidth, max_pixels)
            levels = [[one.asarray()] for one in positions]
        axes, first = series.axes, levels[0][0]
        if first.ndim != len(axes) or not {"Y", "X"} <= set(axes):
            raise UnreadableChannels("axes", f"the order of axes {axes} {first.shape} cannot be told")
        found = ChannelFile(
            levels[0],
            _lettered(axes),
            num_channels,
            pages,
            alpha=alpha,
            inverted=page.photometric == 0,
            nodata=_nodata(page),
            further=levels[1:],
        )
        if lazy:
            weakref.finalize(found, opened.close)
        return found
    except BaseException:
        opened.close()
        raise
    finally:
        if not lazy:
            opened.close()


def _levels(series: Any) -> list[Any]:
    """Return the levels of a TIFF's pyramid, read where they are sliced."""
    zarr = library("zarr")
    return [zarr.open(series.aszarr(level=level), mode="r") for level in range(len(series.levels))]


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


def _zarr(path: str, num_channels: int, pages: str | None) -> ChannelFile:
    """The images of an OME-Zarr, version 0.1 to 0.5; where bioformats2raw wrote several, those like the first."""
    zarr = library("zarr")
    try:
        root = zarr.open_group(path, mode="r")
        collected = "bioformats2raw.layout" in (root.attrs.get("ome") or root.attrs)
        names = sorted((one for one in root.group_keys() if one.isdigit()), key=int) if collected else []
        (levels, axes), *others = [_multiscales(root[name]) for name in names] or [_multiscales(root)]
    except (KeyError, IndexError, TypeError, FileNotFoundError, ValueError) as error:
        raise UnreadableChannels(
            "no multiscales", "a Zarr without `multiscales`, which say what its arrays are; store it as OME-Zarr"
        ) from error
    letters = _lettered("".join(one[0].upper() for one in axes))
    if len(letters) != levels[0].ndim or not {"Y", "X"} <= set(letters):
        raise UnreadableChannels("axes", f"the order of axes {axes} of an array {levels[0].shape} cannot be told")
    shapes = [one.shape for one in levels]
    further = [one for one, named in others if named == axes and [level.shape for level in one] == shapes]
    return ChannelFile(levels, letters, num_channels, pages, further=further)


def _multiscales(group: Any) -> tuple[list[Any], list[str]]:
    """Return the levels of an image in an OME-Zarr, and the names of its axes."""
    attributes = dict(group.attrs)
    scales = (attributes.get("ome") or attributes)["multiscales"][0]
    axes = [one if isinstance(one, str) else one["name"] for one in scales.get("axes", "tczyx")]
    return [group[one["path"]] for one in scales["datasets"]], axes
