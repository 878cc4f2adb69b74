"""Images by index, decoded one at a time, and what can be told of all of them from a few."""

import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from hf_vicreg.training.images.decoding import Header, UnusableImage, decode, read_header, unusable
from hf_vicreg.training.texts.captions import Captions

NUM_SAMPLED = 64
NUM_DECODED = 16  # of a survey's images
DIGEST_BYTES = 16  # of the SHA-256 of an encoded image
NOT_READ = bytes(DIGEST_BYTES)  # the digest of an image whose bytes cannot be read


def digest_of(encoded: bytes) -> bytes:
    """Return what tells an encoded image from others: the beginning of its SHA-256."""
    return hashlib.sha256(encoded).digest()[:DIGEST_BYTES]


@dataclass(frozen=True)
class Survey:
    """What a sample of a source's images says of all.

    Attributes:
        num_images: All images, readable or not.
        looked_at: How many of them were looked at.
        usable_share: Share of images that can be read and are not too small, 0 to 1. All looked at by their headers,
            some of them decoded.
        median_size: Median height and median width of the usable ones, in pixels; (0, 0) without any.
        smallest: (height, width) of the one with the shortest side; (0, 0) without any.
        labelled: Whether there is a label for each image.
    """

    num_images: int
    looked_at: int
    usable_share: float
    median_size: tuple[int, int]
    smallest: tuple[int, int]
    labelled: bool


@dataclass(frozen=True)
class ImageSource:
    """Images by index, with labels where there are any. Can be pickled, for loader processes.

    Attributes:
        name: What the images are called in logs and cards.
        length: Number of images, readable or not.
        read_bytes: Returns the encoded image of an index.
        fingerprint: Changes when the images or their order do; a resumed run checks it.
        labels: One class index from 0 on per image, or None.
        label_names: What the classes are called, where that is known.
        file_names: One path per image, relative to the folder, or None where images are no files of their own.
        min_size: Smallest usable image, (height, width) in pixels.
        paths: One path per image to open, or None where images are no files of their own.
        captions: At least one per image, or None.
    """

    name: str
    length: int
    read_bytes: Callable[[int], bytes]
    fingerprint: str
    labels: list[int] | None = None
    label_names: list[str] | None = None
    file_names: Sequence[str] | None = None
    min_size: tuple[int, int] = (1, 1)
    paths: Sequence[str] | None = None
    captions: Captions | None = None

    def __len__(self) -> int:
        return self.length

    def read(self, index: int, reduction: Callable[[int, int], int] | None = None) -> Image.Image | None:
        """Return the decoded RGB image, upright, or None if it is missing, corrupt or smaller than `min_size`.

        Args:
            index: Which image.
            reduction: Of its (width, height), how many times smaller it may be decoded; see `decode`.
        """
        try:
            return self.read_or_raise(index, reduction)
        except UnusableImage:  # none of them may end a long run
            return None

    def read_or_raise(self, index: int, reduction: Callable[[int, int], int] | None = None) -> Image.Image:
        """Return the image as `read` does.

        Raises:
            UnusableImage: It cannot be used; the text says why.
        """
        try:
            encoded = self.read_bytes(index)
        except Exception as error:  # of a disk, of a table
            raise unusable(error) from error
        return decode(encoded, self.min_size, reduction)

    def digest(self, index: int) -> bytes:
        """Return the digest of an image's bytes, `NOT_READ` if they cannot be read."""
        try:
            return digest_of(self.read_bytes(index))
        except Exception:  # of a disk, of a table
            return NOT_READ

    def refusal(self, index: int) -> UnusableImage | None:
        """Return why an image cannot be used, None if it can."""
        try:
            # as small as it may be: what is wrong with a JPEG shows at an eighth of its size, too
            self.read_or_raise(index, lambda width, height: 8)
        except UnusableImage as error:
            return error
        return None

    def why(self, index: int) -> str | None:
        """Return in words why an image cannot be used, None if it can."""
        refusal = self.refusal(index)
        return None if refusal is None else str(refusal)

    def header(self, index: int) -> Header:
        """Return size and kind of an image without decoding it.

        Raises:
            UnusableImage: What can be told so early of why it cannot be used.
        """
        try:
            file = self._opened(index)
        except Exception as error:  # of a disk, of a table
            raise unusable(error) from error
        with file:
            return read_header(file, self.min_size)

    def _opened(self, index: int) -> BinaryIO:
        """Return an image as an open file: one on a disk need not be read to its end for its header."""
        return BytesIO(self.read_bytes(index)) if self.paths is None else Path(self.paths[index]).open("rb")

    def survey(self, sample: int = 256) -> Survey:
        """Return what up to `sample` images, spread evenly over all, say of sizes and of how many can be used."""
        indices = self._spread(sample)
        sizes = {}
        for index in indices:
            try:
                header = self.header(index)
            except UnusableImage:
                continue
            sizes[index] = (header.height, header.width)
        found = list(sizes)
        decoded = [self.why(index) is None for index in found[:: -(-len(found) // NUM_DECODED) or 1]]
        share = sum(decoded) / len(decoded) * len(sizes) / len(indices) if decoded else 0.0
        heights, widths = ([size[axis] for size in sizes.values()] or [0] for axis in (0, 1))
        return Survey(
            num_images=len(self),
            looked_at=len(indices),
            usable_share=share,
            median_size=(round(statistics.median(heights)), round(statistics.median(widths))),
            smallest=min(sizes.values(), key=min, default=(0, 0)),
            labelled=self.labels is not None,
        )

    def count_usable(self, enough: int) -> int:
        """Return how many images can be used, by decoding them until there are `enough`."""
        count = 0
        for index in range(len(self)):
            if count == enough:
                break
            count += self.why(index) is None
        return count

    def first(self, count: int | None) -> "ImageSource":
        """Return the first `count` images, all of them if `count` is None or larger."""
        length = len(self) if count is None else min(count, len(self))
        labels = None if self.labels is None else self.labels[:length]
        return replace(self, length=length, labels=labels, fingerprint=f"{self.fingerprint}[:{length}]")

    def for_probe(self, count: int) -> "ImageSource":
        """Return `count` images to measure an accuracy on, all of them if it is larger.

        They are the first ones or, where those lack a class, as in a folder of classes, ones spread evenly over all.
        """
        first = self.first(count)
        if self.labels is None or first.labels is None or set(first.labels) == set(self.labels):
            return first
        return self.select([place * len(self) // count for place in range(count)])

    def select(self, indices: Sequence[int]) -> "ImageSource":
        """Return the images at `indices`, in that order, without captions."""
        indices = list(indices)
        file_names, paths = (
            None if one is None else [one[index] for index in indices] for one in (self.file_names, self.paths)
        )
        digest = hashlib.sha256(str(indices).encode()).hexdigest()[:16]
        return replace(
            self,
            length=len(indices),
            read_bytes=_Chosen(self.read_bytes, indices),
            labels=None if self.labels is None else [self.labels[index] for index in indices],
            file_names=file_names,
            paths=paths,
            captions=None,
            fingerprint=f"{self.fingerprint}[{digest}]",
        )

    def at_least(self, height: int, width: int) -> "ImageSource":
        """Return the same images, smaller ones being unusable from now on."""
        return replace(self, min_size=(height, width))

    def describe(self, index: int) -> str:
        """Return what a user finds an image by."""
        return f"row {index}" if self.file_names is None else self.file_names[index]

    def sampled(self) -> Sequence[int]:
        """Return the indices of up to 64 images spread evenly over all."""
        return self._spread(NUM_SAMPLED)

    def _spread(self, count: int) -> Sequence[int]:
        return range(0, len(self), -(-len(self) // count) or 1)


@dataclass(frozen=True)
class _Chosen:
    """Reads the images at some indices; a class, so that loader processes can take it along."""

    read_bytes: Callable[[int], bytes]
    indices: list[int]

    def __call__(self, index: int) -> bytes:
        return self.read_bytes(self.indices[index])
