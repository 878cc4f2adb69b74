"""Images with boxes: what a column `objects` says, checked, and views of them for training."""

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch.utils.data import Dataset

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.channels.channel_source import ChannelSource
from hf_vicreg.training.images.channels.raster import resized
from hf_vicreg.training.images.order import MAX_SUBSTITUTES
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.tasks.arguments import DetectionArguments
from hf_vicreg.training.tasks.data import AnnotatedImages, first_readable, load_annotated
from hf_vicreg.training.tasks.detection.box_checks import BoxCheck

logger = logging.getLogger(__name__)

BOXES, CATEGORIES = ("bbox", "bboxes"), ("category", "categories", "category_id", "label")
MIN_VISIBLE = 0.3  # an object of which a crop shows less than this share of its box is no object any more


@dataclass(frozen=True)
class Objects:
    """What is on an image.

    Attributes:
        boxes: `(objects, 4)` float32: x, y, width, height in pixels of the image.
        categories: `(objects,)` int64, indices of class names.
    """

    boxes: torch.Tensor
    categories: torch.Tensor


def load_detection(
    arguments: DetectionArguments, as_read: Callable[[ImageSource], ImageSource] = lambda source: source
) -> tuple[AnnotatedImages, AnnotatedImages, list[str]]:
    """Return the training and the test split, annotated with `Objects`, and the names of the classes.

    Category names in a column of strings are numbered in alphabetical order of the training split.

    Args:
        arguments: Which data.
        as_read: Gives the images the channels that a model takes; default: they are RGB.

    Raises:
        InputError: No objects, no boxes or categories in them, boxes that are none, categories that the training
            images do not know, and what `BoxCheck` and `load_annotated` refuse.
    """
    column = arguments.objects_column_name
    (train, feature), (test, test_feature) = load_annotated(arguments, column, "objects_column_name")
    train, test = (replace(one, source=as_read(one.source)) for one in (train, test))
    names = _class_names(train, feature)
    train = replace(train, annotations=_parsed(train, feature, names, strict=arguments.strict_boxes))
    test = replace(test, annotations=_parsed(test, test_feature, names, strict=arguments.strict_boxes))
    for one, field in ((train, "train_split"), (test, "test_split")):
        if not any(len(objects.boxes) for objects in one.annotations):
            raise InputError(f"`{field}`: expected objects on the {len(one)} images of {one.split!r}, found none.")
    most = max(len(objects.boxes) for objects in train.annotations)
    if most > arguments.num_queries:
        raise InputError(
            f"`num_queries`: expected at least the {most} objects of the fullest training image, got "
            f"{arguments.num_queries}."
        )
    logger.info(
        "%d training images with %d objects, %d test images with %d, of %d classes",
        len(train),
        sum(len(objects.boxes) for objects in train.annotations),
        len(test),
        sum(len(objects.boxes) for objects in test.annotations),
        len(names),
    )
    return train, test, names


def _class_names(images: AnnotatedImages, feature: Any) -> list[str]:
    """Return the classes by index.

    Raises:
        InputError: No categories.
    """
    named = _category_names(feature)
    if named is not None:
        return named
    found = [one for row in range(len(images)) for one in _columns_of(images, row)[1]]
    if found and all(isinstance(one, str) for one in found):
        return sorted(set(found))
    wrong = next((one for one in found if isinstance(one, bool) or not isinstance(one, int) or one < 0), None)
    if wrong is not None or not found:
        raise InputError(
            "`objects_column_name`: expected categories as indices from 0 on or as names, got "
            f"{'none' if wrong is None else repr(wrong)}."
        )
    return [str(index) for index in range(max(found) + 1)]


def _category_names(feature: Any) -> list[str] | None:
    """Return the names that a `ClassLabel` inside the objects' feature gives, None without one."""
    import datasets

    while isinstance(feature, datasets.List | datasets.LargeList):
        feature = feature.feature
    feature = getattr(feature, "feature", feature)  # datasets' Sequence
    key = next((key for key in CATEGORIES if isinstance(feature, dict) and key in feature), None)
    category = feature[key] if key else None
    while category is not None and not isinstance(category, datasets.ClassLabel):
        category = getattr(category, "feature", None)
    return None if category is None else list(category.names)


def _columns_of(images: AnnotatedImages, row: int) -> tuple[list[Any], list[Any]]:
    """Return boxes and categories of a row, of lists in a dictionary or of dictionaries in a list.

    Raises:
        InputError: Neither, or not as many of one as of the other.
    """
    given = images.annotations[row]
    if given is None:
        return [], []
    if isinstance(given, list):
        if not given:
            return [], []
        if all(isinstance(one, dict) and one.keys() == given[0].keys() for one in given):
            given = {key: [one[key] for one in given] for key in given[0]}
    if not isinstance(given, dict):
        raise InputError(
            f"`objects_column_name`: expected `bbox` and `category` for each object, got {str(given)[:60]!r} in row "
            f"{row} of {images.split!r}."
        )
    found = []
    for what, names in (("bbox", BOXES), ("category", CATEGORIES)):
        key = next((name for name in names if name in given), None)
        if key is None:
            raise InputError(
                f"`objects_column_name`: expected `{what}` for each object, found {sorted(given)} in row {row} of "
                f"{images.split!r}."
            )
        if not isinstance(given[key], list | None):
            raise InputError(
                f"`objects_column_name`: expected a list of `{key}`, one for each object, got {given[key]!r} in row "
                f"{row} of {images.split!r}."
            )
        found.append(given[key] or [])
    if len(found[0]) != len(found[1]):
        raise InputError(
            f"`objects_column_name`: expected as many boxes as categories, got {len(found[0])} and {len(found[1])} in "
            f"row {row} of {images.split!r}."
        )
    return found[0], found[1]


def _parsed(images: AnnotatedImages, feature: Any, names: list[str], *, strict: bool) -> list[Objects]:
    """Return the objects of each image, boxes cut at its border; those of which nothing is left are left out.

    Raises:
        InputError: A box that is none, a category without a name, and what `BoxCheck` refuses.
    """
    check = BoxCheck(images.split, strict)
    known = {name: index for index, name in enumerate(names)}
    own_names = _category_names(feature)
    parsed = []
    for row in range(len(images)):
        boxes, categories = _columns_of(images, row)
        size = image_size(images.source, row) if boxes else None
        numbers = []
        for category in categories:
            if own_names is not None and isinstance(category, int) and 0 <= category < len(own_names):
                category = own_names[category]
            index = known.get(category) if isinstance(category, str) else category
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(names):
                raise InputError(
                    f"`objects_column_name`: expected one of the {len(names)} categories of the training images, got "
                    f"{category!r} in row {row} of {images.split!r}."
                )
            numbers.append(index)
        checked = [check.box(box, size, row) for box in boxes]
        kept = [(box, number) for box, number in zip(checked, numbers, strict=True) if box is not None]
        parsed.append(
            Objects(
                torch.tensor([box for box, _ in kept], dtype=torch.float32).view(-1, 4),
                torch.tensor([number for _, number in kept], dtype=torch.int64),
            )
        )
    check.finish()
    return parsed


def image_size(source: ImageSource, index: int) -> tuple[int, int] | None:
    """Return (height, width) of an image, upright, from its header; None if it is corrupt."""
    try:
        if isinstance(source, ChannelSource):
            header = source.header(index)
            return header.height, header.width
        with Image.open(BytesIO(source.read_bytes(index))) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # on broken files Pillow raises nearly anything; they are replaced when they are read
        return None


class CanvasSampler:
    """Draws a view of an image and its objects: magnified, cropped, flipped, on a canvas of one size, never squashed.

    Attributes:
        canvas: (height, width) in pixels.
        scale_jitter: Images are magnified by a factor from 1 +- this over what fits the canvas.
        flip_probability: Of a horizontal flip.
    """

    def __init__(self, canvas: tuple[int, int], scale_jitter: float, flip_probability: float):
        self.canvas, self.scale_jitter, self.flip_probability = canvas, scale_jitter, flip_probability

    def __call__(self, image: Any, objects: Objects, rng: random.Random) -> dict[str, Any]:
        """Return one training sample of a picture or a `Raster`.

        `pixels` `(channels, height, width)`, uint8 of 8 bits, else float32, 0 where padded; `size` (height, width) of
        what is not padding; `boxes` `(objects, 4)` float32: centre, width and height as shares of `size`;
        `class_labels` `(objects,)`.
        """
        height, width = self.canvas
        fit = min(height / image.height, width / image.width)
        scale = fit * rng.uniform(1 - self.scale_jitter, 1 + self.scale_jitter)
        # as transformers' processors round it: down
        out_height, out_width = (
            max(1, min(side, int(own * scale + 1e-6))) for side, own in ((height, image.height), (width, image.width))
        )
        # less than a pixel too much is rounding, not a reason to crop
        crop_height, crop_width = (
            own if own * scale < out + 1 else out / scale
            for own, out in ((image.height, out_height), (image.width, out_width))
        )
        left, top = rng.uniform(0, image.width - crop_width), rng.uniform(0, image.height - crop_height)
        window = (left, top, left + crop_width, top + crop_height)
        view = np.array(resized(np.asarray(image), (out_width, out_height), window))
        shown = torch.from_numpy(view).permute(2, 0, 1)
        pixels = torch.zeros(len(shown), height, width, dtype=shown.dtype)
        stretch = torch.tensor([out_width / crop_width, out_height / crop_height])
        corners = torch.stack([objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]], dim=1)
        corners = (corners - torch.tensor([left, top])) * stretch  # (objects, 2 corners, x and y)
        whole = (corners[:, 1] - corners[:, 0]).prod(1)
        corners = corners.clamp(min=torch.zeros(2), max=torch.tensor([out_width, out_height]))
        area = (corners[:, 1] - corners[:, 0]).prod(1)
        visible = (area >= MIN_VISIBLE * whole) & (area > 0)
        corners, class_labels = corners[visible], objects.categories[visible]
        if rng.random() < self.flip_probability:
            shown = shown.flip(2)
            corners = torch.stack([out_width - corners[:, [1, 0], 0], corners[:, :, 1]], dim=2)
        pixels[:, :out_height, :out_width] = shown
        size = torch.tensor([out_width, out_height])
        boxes = torch.cat([corners.mean(1) / size, (corners[:, 1] - corners[:, 0]) / size], dim=1)
        return {"pixels": pixels, "size": (out_height, out_width), "boxes": boxes, "class_labels": class_labels}


class DetectionViews(Dataset):
    """Training samples for (epoch, index); all randomness depends on (seed, epoch, index) alone."""

    def __init__(self, images: AnnotatedImages, sampler: CanvasSampler, seed: int):
        self.images, self.sampler, self.seed = images, sampler, seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | None:
        """Return a sample; an unreadable image is replaced by another one, None when too many are."""
        epoch, wanted = key
        substitutes = random.Random(f"{self.seed}/{epoch}/{wanted}/substitute")
        found = first_readable(self.images.source, wanted, substitutes.randrange, MAX_SUBSTITUTES)
        if found is None:
            return None
        index, image = found
        return self.sampler(image, self.images.annotations[index], random.Random(f"{self.seed}/{epoch}/{wanted}/0"))
