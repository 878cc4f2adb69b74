"""A folder of image files of any channels as a source, its pages and windows counted, its blank windows left out."""

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from hf_vicreg.modeling.channel_files import open_channels
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.channels.channel_source import ChannelSource, stamp
from hf_vicreg.training.images.channels.windows import is_blank, windows_of
from hf_vicreg.training.images.files.file_names import FileNames
from hf_vicreg.training.run.places import IMAGE_SUFFIXES, SCIENCE_SUFFIXES, TIFF, files_below

logger = logging.getLogger(__name__)

PAGES_COUNTED = 4096  # files at most that are opened to see whether any holds several images; then all are
OPENED_AT_ONCE = TIFF | {".npy", ".zarr"}  # suffixes of what opens without being decoded
PAGED = OPENED_AT_ONCE | {".dcm"}  # of what may hold several images


def channel_folder(
    folder: str, num_channels: int, pages: str | None = None, window: int | None = None, *, photo: bool = False
) -> ChannelSource:
    """Return the images of a folder of files.

    Args:
        folder: Searched recursively; an OME-Zarr, a folder itself, is a file.
        num_channels: Of every image.
        pages: What pages are, `channels` or `images`; None tells it from the number of channels.
        window: Larger images are read by windows of so many pixels a side; None reads all at once.
        photo: Whether pixels have to be 8-bit RGB.

    Raises:
        InputError: No folder, or no files of known suffixes in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"`train_dir`: expected a folder of images, got {folder}, which is not a folder.")
    suffixes = IMAGE_SUFFIXES | SCIENCE_SUFFIXES
    names = FileNames.of(files_below(folder, zarr=True), folder, suffixes)
    if not names:
        known = ", ".join(sorted(suffixes))
        raise InputError(f"`train_dir`: expected image files ({known}) below {folder}, found none.")
    paths = names.below(folder)
    digest = hashlib.sha256(f"{num_channels} {pages} {window}".encode())
    names.update(digest)
    for path in paths[:: -(-len(paths) // 64)]:
        try:
            digest.update(stamp(path))
        except OSError as error:  # it shall be as corrupt when the run is resumed
            digest.update(type(error).__name__.encode())
    found = ChannelSource(
        root.resolve().name.encode(errors="replace").decode(),
        len(paths),
        partial(_contents, paths),
        digest.hexdigest()[:16],
        file_names=names,
        paths=paths,
        num_channels=num_channels,
        pages=pages,
        photo=photo,
    )
    return _spread_out(found, window)


def without_blank(source: ChannelSource, low: list[float], high: list[float]) -> ChannelSource:
    """Return a source without the windows that hold nothing; how many they are is logged."""
    if source.items is None:
        return source
    items = source.items
    count = np.bincount(items[:, 0] * (1 + items[:, 1].max()) + items[:, 1])
    windowed = count[items[:, 0] * (1 + items[:, 1].max()) + items[:, 1]] > 1
    bounds = np.asarray(low, np.float32), np.asarray(high, np.float32)

    def blank(index: int) -> bool:
        try:
            file, image, box = source.opened_image(index)
            return is_blank(file, image, box, *bounds)
        except Exception:  # it is refused, with its reason, when its turn comes
            return False

    found = np.zeros(len(items), bool)
    # one file after another by one thread: the libraries' files are not shared between threads
    found[windowed] = [blank(int(index)) for index in np.flatnonzero(windowed)]
    if found.all():
        raise InputError(f"`window`: expected windows that hold something in {source.name}, found all blank.")
    if windowed.any():
        logger.info("%d of %d windows are blank and left out", found.sum(), windowed.sum())
    fingerprint = f"{source.fingerprint} {hashlib.sha256(found.tobytes()).hexdigest()[:8]}"
    return replace(source, items=items[~found], length=int((~found).sum()), fingerprint=fingerprint)


def _spread_out(source: ChannelSource, window: int | None) -> ChannelSource:
    """Return a source of single images and windows where a file holds several, else the source as it is."""
    assert source.paths is not None
    every = window is not None or source.pages == "images"
    quick = (one for one in source._spread(PAGES_COUNTED) if _suffix(source, one) in OPENED_AT_ONCE)
    looked_at = range(len(source)) if every else sorted({*source.sampled(), *quick})
    count = partial(_boxes, source, window)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        found = list(threads.map(count, looked_at))
        if all(len(boxes) == 1 and not boxes[0][3] for boxes in found):
            return source
        if len(found) < len(source):
            found = list(threads.map(count, range(len(source))))
    items = np.array([(file, *box) for file, boxes in enumerate(found) for box in boxes], dtype=np.int64)
    logger.info("%d images and windows in %d files", len(items), len(source))
    return replace(source, items=items, length=len(items))


def _suffix(source: ChannelSource, file: int) -> str:
    assert source.paths is not None
    return os.path.splitext(source.paths[file])[1].lower()


def _boxes(source: ChannelSource, window: int | None, file: int) -> list[tuple[int, ...]]:
    """Return (image, left, top, right, bottom) of all that a file holds; one of zeros if it is one or unreadable."""
    assert source.paths is not None
    if window is None and _suffix(source, file) not in PAGED:
        return [(0, 0, 0, 0, 0)]
    try:
        opened = open_channels(source.paths[file], source.num_channels, source.pages, lazy=True)
    except Exception:  # it is refused, with its reason, when its turn comes
        return [(0, 0, 0, 0, 0)]
    height, width = opened.size()
    if window is None or max(height, width) <= window:
        return [(image, 0, 0, 0, 0) for image in range(opened.num_images)]
    return [(image, *box) for image in range(opened.num_images) for box in windows_of(height, width, window)]


def _contents(paths: Sequence[str], index: int) -> bytes:
    return Path(paths[index]).read_bytes()
