"""Where images come from, and the order in which a run sees them.

An `ImageSource` gives decoded images by index. A `ViewDataset` turns (epoch, index) into two uint8 crops. A
`StepSampler` says which images each step of each process sees, as a function of the step alone: that, and randomness
keyed on (seed, epoch, index, view), is why a resumed run sees what it would have seen, with any number of workers and
any number of processes that divides the batch.
"""

import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler

from hf_vicreg.training.digits import digit_images
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.views import ViewSampler

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_SUBSTITUTES = 64


class ImageSource:
    """Images by index, with labels where there are any.

    Attributes:
        name: What the images are called in logs and cards.
        labels: One integer per image, or None.
        fingerprint: Changes when the images or their order do; a resumed run checks it.
    """

    def __init__(
        self,
        name: str,
        length: int,
        read: Callable[[int], Image.Image],
        fingerprint: str,
        labels: list[int] | None = None,
    ):
        self.name = name
        self.labels = labels
        self.fingerprint = fingerprint
        self._length = length
        self._read = read

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Image.Image | None:
        """Return the decoded RGB image, upright, or None if it is corrupt."""
        try:
            image = self._read(index)
            return ImageOps.exif_transpose(image).convert("RGB")
        # what Pillow raises for broken files, by format; anything else is a bug and may surface
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
            return None

    def first(self, count: int | None) -> "ImageSource":
        """Return the first `count` images, all of them if `count` is None or larger."""
        length = len(self) if count is None else min(count, len(self))
        labels = None if self.labels is None else self.labels[:length]
        return ImageSource(self.name, length, self._read, f"{self.fingerprint}[:{length}]", labels)


def load_sources(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
) -> tuple[ImageSource, ImageSource | None]:
    """Return the images to train on and, where a labelled split is known, those to test on.

    Raises:
        InputError: Nothing to read there, no or several image columns, an unknown split or column.
    """
    if train_dir is not None:
        return _folder_source(train_dir), None
    assert dataset_name is not None
    if dataset_name == "digits":
        images, labels = digit_images()
        train, test = (
            ImageSource("digits", len(images[split]), images[split].__getitem__, f"digits/{split}", labels[split])
            for split in ("train", "test")
        )
        return train, test
    splits = _load_splits(dataset_name, dataset_config_name)
    if train_split not in splits:
        raise InputError(f"`train_split`: expected one of {sorted(splits)} in {dataset_name}, got {train_split!r}.")
    if test_split is None:
        test_split = next((name for name in ("test", "validation") if name in splits and name != train_split), None)
    elif test_split not in splits:
        raise InputError(f"`test_split`: expected one of {sorted(splits)} in {dataset_name}, got {test_split!r}.")
    columns = (image_column_name, label_column_name)
    source = _dataset_source(dataset_name, splits[train_split], *columns)
    held_out = None if test_split is None else _dataset_source(dataset_name, splits[test_split], *columns)
    return source, held_out


def _folder_source(folder: str) -> ImageSource:
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"`train_dir`: expected a folder of images, got {folder}, which is not a folder.")
    paths = sorted(
        os.path.join(where, name)
        for where, _, names in os.walk(root, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    )
    if not paths:
        raise InputError(
            f"`train_dir`: expected image files ({', '.join(sorted(IMAGE_SUFFIXES))}) below {folder}, found none; "
            "parquet files are read by --dataset_name."
        )
    relative = "\n".join(os.path.relpath(path, root) for path in paths)
    digest = hashlib.sha256(relative.encode(errors="surrogateescape")).hexdigest()[:16]
    return ImageSource(root.resolve().name, len(paths), lambda index: _open(paths[index]), f"folder/{digest}")


def _open(path: str) -> Image.Image:
    # whole file first: Pillow leaves a file open that it cannot identify
    return Image.open(BytesIO(Path(path).read_bytes()))


def _load_splits(name: str, config: str | None) -> dict[str, Any]:
    import datasets

    if os.path.exists(name) and (not os.path.isdir(name) or not os.listdir(name)):
        raise InputError(f"`dataset_name`: expected a folder with data files, got {name}, which is empty or a file.")
    if os.path.sep in name and not os.path.exists(name) and name.count("/") != 1:
        raise InputError(f"`dataset_name`: expected a Hub id or an existing folder, got {name}, which does not exist.")
    try:
        if os.path.isfile(os.path.join(name, "dataset_info.json")) or os.path.isfile(
            os.path.join(name, "dataset_dict.json")
        ):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config)
    except Exception as error:  # the library raises dozens of kinds for what is all the same to a user
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"`dataset_name`: cannot load {name}: {type(error).__name__}: {reason}") from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _dataset_source(name: str, dataset: Any, image_column: str | None, label_column: str | None) -> ImageSource:
    import datasets

    image_columns = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if image_column is None:
        if len(image_columns) != 1:
            raise InputError(
                f"`image_column_name`: expected one image column in {name}, found {image_columns or 'none'} among "
                f"{sorted(dataset.features)}; name it with --image_column_name."
            )
        image_column = image_columns[0]
    elif image_column not in image_columns:
        raise InputError(
            f"`image_column_name`: expected one of the image columns {image_columns} of {name}, got {image_column!r}."
        )
    if label_column is None:
        label_column = "label" if "label" in dataset.features else None
    elif label_column not in dataset.features:
        raise InputError(
            f"`label_column_name`: expected one of {sorted(dataset.features)} in {name}, got {label_column!r}."
        )
    labels = None
    if label_column is not None:
        labels = list(dataset[label_column])
        if not all(isinstance(one, int) for one in labels):
            raise InputError(
                f"`label_column_name`: expected integers in column {label_column!r} of {name}, got "
                f"{type(next(one for one in labels if not isinstance(one, int))).__name__}."
            )
    if len(dataset) == 0:
        raise InputError(f"`dataset_name`: expected images in {name}, found an empty split.")
    # bytes, not decoded images: one corrupt file must not end the run
    encoded = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))

    def read(index: int) -> Image.Image:
        entry = encoded[index][image_column]
        if entry is None:
            raise ValueError("no image in this row")
        return Image.open(BytesIO(entry["bytes"])) if entry["bytes"] is not None else _open(entry["path"])

    source = os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name
    logger.info("dataset %s: image column %r, label column %r", source, image_column, label_column)
    return ImageSource(source, len(dataset), read, f"dataset/{dataset._fingerprint}", labels)


class ViewDataset(Dataset):
    """Two uint8 crops and their colour parameters for (epoch, index)."""

    def __init__(self, source: ImageSource, sampler: ViewSampler, seed: int):
        self.source = source
        self.sampler = sampler
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return `views` `(2, 3, size, size)` uint8, `colours` `(2, parameters)` float32 and `corrupt` indices.

        A corrupt image is replaced by the next readable one, the same in every run, so that batches keep their size.
        `views` is None when too many in a row are corrupt.
        """
        epoch, wanted = key
        corrupt: list[int] = []
        for offset in range(min(MAX_SUBSTITUTES, len(self.source))):
            index = (wanted + offset) % len(self.source)
            image = self.source.read(index)
            if image is not None:
                drawn = [
                    self.sampler(image, random.Random(f"{self.seed}/{epoch}/{wanted}/{view}")) for view in range(2)
                ]
                views, colours = zip(*drawn, strict=True)
                return {"views": torch.stack(views), "colours": torch.tensor(colours), "corrupt": corrupt}
            corrupt.append(index)
        return {"views": None, "colours": None, "corrupt": corrupt}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch: `views` `(batch, 2, 3, size, size)`, `colours` `(batch, 2, parameters)`, `corrupt` a list."""
    corrupt = [index for sample in samples for index in sample["corrupt"]]
    if any(sample["views"] is None for sample in samples):
        return {"views": None, "colours": None, "corrupt": corrupt}
    return {
        "views": torch.stack([sample["views"] for sample in samples]),
        "colours": torch.stack([sample["colours"] for sample in samples]),
        "corrupt": corrupt,
    }


class StepSampler(Sampler):
    """Yields this process's (epoch, index) keys, step after step, from any step on.

    Every epoch is a new permutation that depends on (seed, epoch) alone; the last, short batch is dropped. Process r
    of W takes the r-th of W equal runs of each batch, so the batch is the same set of images whatever W is.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, first_step: int, num_steps: int, rank: int, world_size: int
    ):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.steps = range(first_step, num_steps)
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_images // self.batch_size
        order_epoch, order = -1, []
        for step in self.steps:
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, list(range(self.num_images))
                random.Random(f"{self.seed}/{epoch}").shuffle(order)
            batch = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield [(epoch, index) for index in batch[self.share]]
