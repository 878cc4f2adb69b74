"""Images with masks, checked, and crops of them for training."""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.channels.raster import resized
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.images.order import MAX_SUBSTITUTES
from hf_vicreg.training.tasks.arguments import DenseArguments, SegmentationArguments
from hf_vicreg.training.tasks.data import AnnotatedImages, first_readable, load_annotated
from hf_vicreg.training.tasks.segmentation.masks import (
    INSTANCE_CLASSES,
    MAX_CLASSES,
    OUTSIDE,
    checked_highest,
    classes_of,
    read_mask,
)

logger = logging.getLogger(__name__)


def load_segmentation(
    arguments: SegmentationArguments | DenseArguments,
    as_read: Callable[[ImageSource], ImageSource] = lambda source: source,
) -> tuple[AnnotatedImages, AnnotatedImages, list[str]]:
    """Return the training and the test split, annotated with encoded masks, and the names of the classes.

    Args:
        arguments: Which data.
        as_read: Gives the images the channels that a model takes; default: they are RGB.

    Raises:
        InputError: A column that is none of images, names that are none, no class but one, and what `checked_highest`
            and `load_annotated` refuse.
    """
    import datasets

    column = arguments.mask_column_name
    named = _named(arguments)
    (train, feature), (test, test_feature) = load_annotated(arguments, column, "mask_column_name")
    train, test = (replace(one, source=as_read(one.source)) for one in (train, test))
    for images, kind in ((train, feature), (test, test_feature)):
        if not isinstance(kind, datasets.Image):
            raise InputError(
                f"`mask_column_name`: expected a column of images, {column!r} in {images.split!r} is none; in a "
                f"metadata file the column of a folder's masks is called {column}_file_name."
            )
    if arguments.instances:
        names = INSTANCE_CLASSES
        if not checked_highest(train, None):
            raise InputError(f"`train_split`: expected objects in the masks of {train.split!r}, found none.")
        checked_highest(test, None)
    else:
        highest = checked_highest(train, len(named) if named else MAX_CLASSES)
        names = named or [str(index) for index in range(highest + 1)]
        if len(names) < 2:
            raise InputError(f"`train_split`: expected at least two classes in {train.split!r}, found 0 everywhere.")
        checked_highest(test, len(names))
    logger.info("%d training images, %d test images, of %d classes", len(train), len(test), len(names))
    return train, test, names


def _named(arguments: SegmentationArguments | DenseArguments) -> list[str]:
    if arguments.class_names is None:
        return []
    names = [name.strip() for name in arguments.class_names.split(",")]
    if arguments.instances:
        raise InputError("`class_names`: expected none with --instances, whose classes have names; leave one out.")
    if not 2 <= len(names) <= MAX_CLASSES or "" in names or len(set(names)) < len(names):
        raise InputError(
            f"`class_names`: expected 2 to {MAX_CLASSES} names that differ, as in background,cell, got "
            f"{arguments.class_names!r}."
        )
    return names


class CropSampler:
    """Draws a crop of an image and the same one of its mask: turned, magnified, flipped, on a canvas of one size.

    Attributes:
        canvas: (height, width) in pixels.
        scale_jitter: Images are magnified by a factor from 1 +- this.
        flip_probability: Of a horizontal flip.
        quarter_turns: Whether images are turned by any number of right angles first.
    """

    def __init__(
        self, canvas: tuple[int, int], scale_jitter: float, flip_probability: float, *, quarter_turns: bool = False
    ):
        self.canvas, self.scale_jitter = canvas, scale_jitter
        self.flip_probability, self.quarter_turns = flip_probability, quarter_turns

    def __call__(
        self, image: Any, mask: np.ndarray, rng: random.Random
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """Return pixels `(channels, height, width)`, the mask `(height, width)` int32, and their (height, width).

        Pixels of 8 bits are uint8, of other depths float32.

        Pixels are resampled bilinearly, the mask takes the nearest pixel. Beyond what is returned as their size is no
        image: pixels are 0, the mask is `OUTSIDE`.
        """
        pixels = np.asarray(image)
        if self.quarter_turns:
            turns = rng.randrange(4)
            pixels, mask = np.rot90(pixels, turns), np.rot90(mask, turns)
        scale = rng.uniform(1 - self.scale_jitter, 1 + self.scale_jitter)
        own = mask.shape
        out = tuple(max(1, min(side, round(length * scale))) for side, length in zip(self.canvas, own, strict=True))
        crop = [min(length, side / scale) for side, length in zip(out, own, strict=True)]
        top, left = (rng.uniform(0, length - side) for side, length in zip(crop, own, strict=True))
        box = (left, top, left + crop[1], top + crop[0])
        view = resized(pixels, (out[1], out[0]), box)
        rows, columns = nearest(top, crop[0], out[0], own[0]), nearest(left, crop[1], out[1], own[1])
        labels = mask[rows[:, None], columns]
        if rng.random() < self.flip_probability:
            view, labels = view[:, ::-1], labels[:, ::-1]
        shown = torch.from_numpy(view.copy()).permute(2, 0, 1)
        canvas = torch.zeros(len(shown), *self.canvas, dtype=shown.dtype)
        canvas[:, : out[0], : out[1]] = shown
        numbers = torch.full(self.canvas, OUTSIDE, dtype=torch.int32)
        numbers[: out[0], : out[1]] = torch.from_numpy(labels.copy())
        return canvas, numbers, (out[0], out[1])


def nearest(start: float, crop: float, out: int, length: int) -> np.ndarray:
    """Return the pixel of a side of `length` below the centre of each of `out` equal parts of a crop of it."""
    return np.clip(np.floor(start + (np.arange(out) + 0.5) * crop / out), 0, length - 1).astype(int)


class SegmentationViews(Dataset):
    """Training samples for (epoch, index); all randomness depends on (seed, epoch, index) alone."""

    def __init__(self, images: AnnotatedImages, sampler: CropSampler, seed: int, *, instances: bool):
        self.images, self.sampler, self.seed, self.instances = images, sampler, seed, instances

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | None:
        """Return `pixels`, `size` and `classes` `(height, width)` int64; None when too many images are unreadable."""
        epoch, wanted = key
        substitutes = random.Random(f"{self.seed}/{epoch}/{wanted}/substitute")
        found = first_readable(self.images.source, wanted, substitutes.randrange, MAX_SUBSTITUTES)
        if found is None:
            return None
        index, image = found
        mask, rng = read_mask(self.images.annotations[index]), random.Random(f"{self.seed}/{epoch}/{wanted}/0")
        pixels, numbers, size = self.sampler(image, mask, rng)
        return {"pixels": pixels, "size": size, "classes": classes_of(numbers, instances=self.instances)}


def collate(samples: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return `pixels` `(batch, channels, height, width)`, `classes` and `sizes`; None if a sample is missing."""
    found = [sample for sample in samples if sample is not None]
    if len(found) < len(samples):
        return None
    return {
        "pixels": torch.stack([sample["pixels"] for sample in found]),
        "classes": torch.stack([sample["classes"] for sample in found]),
        "sizes": [sample["size"] for sample in found],
    }
