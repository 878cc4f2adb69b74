"""Masks: read from image files, checked against their images, and turned into classes."""

from importlib.util import find_spec
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.tasks.data import AnnotatedImages
from hf_vicreg.training.tasks.detection.data import image_size

IGNORED = 255  # a class index that neither loss nor measures count
OUTSIDE = -1  # of a mask: not part of the image
INSTANCE_CLASSES = ["background", "interior", "border"]
BORDER_WIDTH = 2  # pixels of an object that near to anything else are its border
MAX_CLASSES = 255  # a mask is an image of bytes, and one of them is `IGNORED`


def read_mask(encoded: bytes | None) -> np.ndarray:
    """Return `(height, width)` int32, one number a pixel, of an encoded image; of a palette, its indices.

    Raises:
        ValueError: No image, or one of colours or broken numbers; the text says what there was.
    """
    if encoded is None:
        raise ValueError("none")
    try:
        with Image.open(BytesIO(encoded)) as image:
            numbers = np.asarray(image)
    except Exception as error:  # on broken files Pillow raises nearly anything
        raise ValueError("a file that cannot be read") from error
    if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
        raise ValueError(f"an image of mode {image.mode}")
    return numbers.astype(np.int32)


def checked_highest(images: AnnotatedImages, limit: int | None) -> int:
    """Read all masks of a split and return the highest number in them, `IGNORED` left out where there is a limit.

    Args:
        images: With encoded masks.
        limit: How many classes there may be; None: numbers are those of objects.

    Raises:
        InputError: A mask that is missing, unreadable or of another size than its image, or a class beyond the limit.
    """
    highest = 0
    for row in range(len(images)):
        where = f"in row {row} of {images.split!r}"
        try:
            mask = read_mask(images.annotations[row])
        except ValueError as error:
            raise InputError(
                "`mask_column_name`: expected a mask with one whole number a pixel for each image, got "
                f"{error} {where}."
            ) from error
        size = image_size(images.source, row)
        if size is not None and mask.shape != size:
            raise InputError(
                f"`mask_column_name`: expected a mask of its image's size, {size[1]}x{size[0]} pixels, got "
                f"{mask.shape[1]}x{mask.shape[0]} {where}."
            )
        known = mask if limit is None else mask[mask != IGNORED]
        if limit is not None and known.size and not 0 <= known.min() <= known.max() < limit:
            wrong = known.max() if known.max() >= limit else known.min()
            raise InputError(
                f"`class_names`: expected masks of the {limit} classes 0 to {limit - 1}, and {IGNORED} where unknown, "
                f"got {wrong} {where}; name all classes, or add --instances if the numbers are those of objects."
            )
        highest = max(highest, int(known.max(initial=0)))
    return highest


def classes_of(mask: torch.Tensor, *, instances: bool) -> torch.Tensor:
    """Return `(height, width)` int64 class indices of a mask `(height, width)`; outside the image they are `IGNORED`.

    With `instances` the mask numbers objects. An object's border are its pixels with anything else, other objects or
    background, at most `BORDER_WIDTH` rows and columns away; where the image ends is no border.
    """
    mask = mask.to(torch.int64)
    outside = mask == OUTSIDE
    if not instances:
        return mask.masked_fill(outside, IGNORED)
    side = 2 * BORDER_WIDTH + 1
    # float64 holds every number of an object; padding of `max_pool2d` never wins
    numbers = mask.to(torch.float64)[None, None]
    highest = torch.nn.functional.max_pool2d(numbers.masked_fill(outside, -torch.inf), side, 1, BORDER_WIDTH)
    lowest = -torch.nn.functional.max_pool2d((-numbers).masked_fill(outside, -torch.inf), side, 1, BORDER_WIDTH)
    inner = (highest == lowest)[0, 0]
    classes = torch.where(inner, 1, 2).masked_fill(mask == 0, 0)
    return classes.masked_fill(outside, IGNORED)


def objects_of(classes: np.ndarray) -> np.ndarray:
    """Return `(height, width)` int32: objects numbered from 1 on, 0 elsewhere, of background, interior and border.

    An object is a connected part of the interior. A pixel of the border belongs to the nearest object in its connected
    part of interior and border; a part without interior is an object of its own.
    """
    from scipy import ndimage

    parts, num_parts = ndimage.label(classes > 0)
    seeds, count = ndimage.label(classes == 1)
    own_seed = np.zeros(num_parts + 1, np.int32)  # of parts without interior
    empty = np.setdiff1d(np.arange(1, num_parts + 1), parts[seeds > 0])
    own_seed[empty] = count + 1 + np.arange(len(empty))
    seeds = np.where(own_seed[parts] > 0, own_seed[parts], seeds)
    if not seeds.any():
        return np.zeros(classes.shape, np.int32)
    objects, strayed = _nearest_seed(seeds, parts)
    places = ndimage.find_objects(parts)
    for number in np.unique(parts[strayed]):  # the nearest seed lies beyond background: look within the part alone
        place = places[number - 1]
        own = parts[place] == number
        objects[place][own] = _nearest_seed(np.where(own, seeds[place], 0), parts[place])[0][own]
    return np.where(parts > 0, objects, 0).astype(np.int32)


def _nearest_seed(seeds: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest seed of each pixel, and where one of a part has that of another."""
    from scipy import ndimage

    rows, columns = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    return seeds[rows, columns], (parts > 0) & (parts != parts[rows, columns])


def check_extra() -> None:
    """Check that what telling objects apart needs beside the package is there.

    Raises:
        InputError: It is not.
    """
    if find_spec("scipy") is None:
        raise InputError("`instances`: expected scipy; pip install 'hf-vicreg[detection]'.")
