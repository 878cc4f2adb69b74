"""Images of any channels as a source: one for each file, for each page of it, or for each window of a huge one."""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np

from hf_vicreg.modeling.channel_files import open_channels
from hf_vicreg.modeling.channel_layout import ChannelFile, UnreadableChannels, refuse_larger
from hf_vicreg.training.images.channels.raster import Raster
from hf_vicreg.training.images.channels.windows import box_at, level_for
from hf_vicreg.training.images.decoding import MAX_PIXELS, Header, UnusableImage, unusable
from hf_vicreg.training.images.image_source import NOT_READ, ImageSource, digest_of

logger = logging.getLogger(__name__)

KEPT_OPEN = 8  # files that are read by windows, in each process
LOOKED_THROUGH = 2**24  # pixels of an image that is read to its end to tell whether it can be used
FINGERPRINTED = 2**16  # bytes of a file: those of a slide are not read to their end for it
# Files that are open in a process: a forked one must not share another's place in a file.
_opened: OrderedDict[tuple[Any, ...], ChannelFile] = OrderedDict()


@dataclass(frozen=True)
class ChannelSource(ImageSource):
    """Images of `num_channels` by index, as `Raster`s; see `ImageSource` for what else it has.

    Attributes:
        num_channels: Of every image.
        pages: What pages of a file are, `channels` or `images`; None tells it from the number of channels.
        photo: Whether pixels have to be 8-bit RGB.
        items: `(images, 6)` int64: file, image in it, and box (left, top, right, bottom) of each image; None where
            each file is one. A box whose right is 0 is all of its image.
    """

    num_channels: int = 3
    pages: str | None = None
    photo: bool = False
    items: np.ndarray | None = None
    _stamped: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)  # of the file read last

    def read(self, index: int, reduction: Callable[[int, int], int] | None = None) -> Any:
        """Return the image as a `Raster`, or None if it cannot be used.

        Its pixels are read here; with a `reduction`, and where they are too many for once, when it is cropped: then
        they may still turn out damaged.
        """
        found = super().read(index, reduction)
        if found is None or reduction is not None or found.width * found.height > MAX_PIXELS:
            return found
        try:
            return Raster.of(np.asarray(found))
        except UnusableImage:
            return None

    def read_or_raise(self, index: int, reduction: Callable[[int, int], int] | None = None) -> Any:
        """Return the image as a `Raster`, of the coarsest level of its pyramid that `reduction` lets be taken.

        Raises:
            UnusableImage: It cannot be used; the text says why.
        """
        file, image, box = self.opened_image(index)
        width, height = box[2] - box[0], box[3] - box[1]
        if height < self.min_size[0] or width < self.min_size[1]:
            least = f"{self.min_size[1]}x{self.min_size[0]}"
            raise UnusableImage("too small", f"{width}x{height} pixels, smaller than a patch of {least}")
        if self.photo and file.levels[0].dtype != np.uint8:
            found = file.levels[0].dtype
            raise UnusableImage("depth", f"{found} where photographs have 8 bits; add --normalisation percentile")
        if reduction is not None and len(file.levels) > 1:
            level, *factors = level_for(file, reduction(width, height))
            left, top, right, bottom = box_at(box, (factors[0], factors[1]), file.size(level)) if level else box
            return Raster(file, image, level, (left, top, right, bottom))
        return Raster(file, image, 0, box)

    def refusal(self, index: int) -> UnusableImage | None:
        """Return why an image cannot be used, None if it can; of a large one a corner is read."""
        try:
            raster = self.read_or_raise(index)
            whole = raster.width * raster.height <= LOOKED_THROUGH
            raster.crop((0, 0, *(raster.size if whole else (64, 64))))
        except UnusableImage as error:
            return error
        return None

    def header(self, index: int) -> Header:
        """Return size and kind of an image."""
        raster = self.read_or_raise(index)
        depth = f"{self.num_channels} x {np.dtype(raster.file.levels[0].dtype).name}"
        place = None if self.paths is None else self.paths[self._file_of(index)]
        suffix = os.path.splitext(place)[1].lstrip(".").upper() if place else ""
        return Header(raster.width, raster.height, depth, suffix or "image")

    def digest(self, index: int) -> bytes:
        """Return the digest of an image: of its file's first bytes and size, and of where in it the image lies."""
        if self.items is None and (self.paths is None or not os.path.isdir(self.paths[index])):
            return super().digest(index)
        assert self.paths is not None
        try:
            beginning = self._stamp(self.paths[self._file_of(index)])
        except OSError:
            return NOT_READ
        place = b"" if self.items is None else self.items[index].tobytes()
        return digest_of(beginning + place)

    def describe(self, index: int) -> str:
        """Return what a user finds it by: the file, and where in it."""
        if self.items is None or self.file_names is None:
            return super().describe(index)
        file, image, left, top, right, bottom = (int(one) for one in self.items[index])
        several = f", image {image}" if self.num_images_of(file) > 1 else ""
        window = f", pixels {left}-{right} x {top}-{bottom}" if right else ""
        return f"{self.file_names[file]}{several}{window}"

    def num_images_of(self, file: int) -> int:
        """Return how many images a file has, windows aside."""
        assert self.items is not None
        return 1 + int(self.items[self.items[:, 0] == file, 1].max(initial=0))

    def first(self, count: int | None) -> "ChannelSource":
        """Return the first `count` images."""
        found = super().first(count)
        assert isinstance(found, ChannelSource)
        return found if self.items is None else replace(found, items=self.items[: len(found)])

    def _spread(self, count: int) -> Sequence[int]:
        """Return up to `count` indices, one of each of as many equal parts; of windows at a drawn place in its part.

        Windows lie in rows, one file's after another's: even steps can meet the same column in all of them.
        """
        even = super()._spread(count)
        if self.items is None or not self.items[:, 4].any():
            return even
        assert isinstance(even, range)
        places = Random(0)  # the same for all who ask, on every machine
        return [start + int(places.random() * min(even.step, len(self) - start)) for start in even]

    def _stamp(self, path: str) -> bytes:
        """Return a file's stamp; its windows, which come one after another, share it."""
        found = self._stamped.get(path)
        if found is None:
            found = stamp(path)
            self._stamped.clear()
            self._stamped[path] = found
        return found

    def _file_of(self, index: int) -> int:
        return index if self.items is None else int(self.items[index, 0])

    def opened_image(self, index: int) -> tuple[ChannelFile, int, tuple[int, int, int, int]]:
        place = self._file_of(index)
        image, *box = (0, 0, 0, 0, 0) if self.items is None else (int(one) for one in self.items[index, 1:])
        lazy = self.items is not None
        encoded: bytes | None = None
        try:
            if self.paths is None:
                encoded = self.read_bytes(place)
                file = open_channels(encoded, self.num_channels, self.pages, max_pixels=MAX_PIXELS)
            else:
                file = opened_file(self.paths[place], self.num_channels, self.pages, lazy=lazy)
            height, width = file.size()
            refuse_larger(height, width, None if lazy else MAX_PIXELS)
        except UnreadableChannels as error:
            raise UnusableImage(error.kind, str(error)) from error
        except Exception as error:  # on broken files libraries raise nearly anything
            if encoded is None and self.paths is not None:
                encoded = _first_bytes(self.paths[place])
            raise unusable(error, encoded) from error
        left, top, right, bottom = box if box[2] else (0, 0, width, height)
        return file, image, (left, top, right, bottom)


def opened_file(path: str, num_channels: int, pages: str | None, *, lazy: bool) -> ChannelFile:
    """Return a file's images; those that are read lazily stay open, the last few of them."""
    if not lazy:
        return open_channels(path, num_channels, pages, max_pixels=MAX_PIXELS)
    key = (os.getpid(), path, num_channels, pages)
    if key not in _opened:
        _opened[key] = open_channels(path, num_channels, pages, lazy=True)
        # such a file takes the memory of all its pixels: one at a time
        for other in [one for one, file in _opened.items() if file.is_decoded][:-1]:
            del _opened[other]
        while len(_opened) > KEPT_OPEN:
            _opened.popitem(last=False)
    _opened.move_to_end(key)
    return _opened[key]


def as_channels(source: ImageSource, num_channels: int, pages: str | None = None) -> ChannelSource:
    """Return the images of a source that is there, read with all their channels."""
    fingerprint = f"{source.fingerprint} {num_channels} {pages}"
    return ChannelSource(**(vars(source) | {"fingerprint": fingerprint}), num_channels=num_channels, pages=pages)


def raster_of(
    encoded: bytes, num_channels: int, pages: str | None = None, min_size: tuple[int, int] = (1, 1)
) -> Raster:
    """Return an encoded image with all its channels, as that of a row of a dataset; of several pages the first.

    Raises:
        UnusableImage: It cannot be used; the text says why.
    """
    alone = ImageSource("image", 1, lambda _: encoded, "", min_size=min_size)
    return as_channels(alone, num_channels, pages).read_or_raise(0)


def _first_bytes(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(FINGERPRINTED)
    except OSError:
        return b"a folder that is no OME-Zarr" * 4 if os.path.isdir(path) else None


def stamp(path: str) -> bytes:
    """Return what changes when a file does: its size and first bytes; of an OME-Zarr those of files in it.

    Of an OME-Zarr the first 1024 files' names and sizes count, and the first bytes of the metadata and of about 32.
    """
    if os.path.isdir(path):
        inside: list[str] = []
        for folder, below, names in os.walk(path):
            below.sort()
            inside += [os.path.join(folder, one) for one in sorted(names)]
            if len(inside) > 1024:
                break
        del inside[1024:]
        sizes = "".join(f"{os.path.relpath(one, path)} {os.path.getsize(one)} " for one in inside)
        read = [one for one in inside if os.path.dirname(one) == path] + inside[:: max(1, len(inside) // 32)]
        return sizes.encode(errors="replace") + b"".join(stamp(one) for one in read)
    with open(path, "rb") as file:
        return str(os.path.getsize(path)).encode() + file.read(FINGERPRINTED)
