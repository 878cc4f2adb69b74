"""Where images come from: a folder of files, a `datasets` folder, a Hub id, or the built-in digits.

An `ImageSource` (`image_source.py`) gives them decoded by index, and survives what is wrong with some of them.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.digits import digit_images
from hf_vicreg.training.images.files.file_names import FileNames
from hf_vicreg.training.images.hub_reach import hub_trouble, without_hub
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.run.places import IMAGE_SUFFIXES, SCIENCE_SUFFIXES, files_below

logger = logging.getLogger(__name__)


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
    """Return the images to train on and, where there is a labelled split beside them, those to test on.

    Raises:
        InputError: Nothing to read there, no or several image columns, an unknown split or column.
    """
    if train_dir is not None:
        return _folder_source(train_dir), None
    assert dataset_name is not None
    if dataset_name == "digits":
        train, test = (
            fingerprinted("digits", len(encoded), encoded.__getitem__, labels)
            for encoded, labels in (_digits(split) for split in ("train", "test"))
        )
        return train, test
    splits = load_splits(dataset_name, dataset_config_name)
    for flag, split in (("train_split", train_split), ("test_split", test_split)):
        if split is not None and split not in splits:
            raise InputError(f"`{flag}`: expected one of {sorted(splits)} in {dataset_name}, got {split!r}.")
    columns = (image_column_name, label_column_name)
    source = dataset_source(dataset_name, splits[train_split], *columns)
    if test_split is not None:
        return source, _numbered_as(source, dataset_source(dataset_name, splits[test_split], *columns, said=True))
    for split in ("test", "validation"):
        if source.labels is not None and split in splits and split != train_split and len(splits[split]):
            held_out = _numbered_as(source, dataset_source(dataset_name, splits[split], *columns, said=True))
            if held_out.labels is not None:
                return source, held_out
    return source, None


def _numbered_as(source: ImageSource, held_out: ImageSource) -> ImageSource:
    """Return held-out images whose labels have the training split's numbers, where both splits name their classes.

    Each split may number its own classes, so one that it lacks moves all that follow.
    """
    names, own = source.label_names, held_out.label_names
    if source.labels is None or held_out.labels is None or not names or not own or list(names) == list(own):
        return held_out
    unknown = sorted({own[label] for label in held_out.labels} - set(names))
    if unknown:
        logger.warning(
            "dataset %s: %s among the held-out images is no class of the training images; no accuracy is measured",
            source.name,
            repr(unknown[0]),
        )
        return replace(held_out, labels=None, label_names=None)
    number = {name: index for index, name in enumerate(names)}
    labels = [number[own[label]] for label in held_out.labels]
    return replace(held_out, labels=labels, label_names=list(names))


def fingerprinted(name: str, length: int, read_bytes: Callable[[int], bytes], labels: list[int] | None) -> ImageSource:
    """Return a source whose fingerprint is of the contents, so that it outlives copying the data elsewhere."""
    # a file system's name need not be text
    name = name.encode(errors="replace").decode()
    source = ImageSource(name, length, read_bytes, "", labels)
    digest = hashlib.sha256(str(length).encode())
    for index in source.sampled():
        try:
            digest.update(read_bytes(index))
        except OSError as error:  # corrupt; it shall be as corrupt when the run is resumed
            digest.update(type(error).__name__.encode())
    return replace(source, fingerprint=digest.hexdigest()[:16])


def _digits(split: str) -> tuple[list[bytes], list[int]]:
    images, labels = digit_images()
    encoded = []
    for image in images[split]:
        buffer = BytesIO()
        image.save(buffer, "PNG", compress_level=0)
        encoded.append(buffer.getvalue())
    return encoded, labels[split]


def _folder_source(folder: str) -> ImageSource:
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"`train_dir`: expected a folder of images, got {folder}, which is not a folder.")
    names = FileNames.of(files_below(folder), folder, IMAGE_SUFFIXES)
    if not names:
        others = SCIENCE_SUFFIXES & {os.path.splitext(path)[1].lower() for path in files_below(folder)}
        if others or any(root.rglob("*.zarr")):
            raise InputError(
                f"`train_dir`: expected photographs, found {', '.join(sorted(others)) or '.zarr'} below {folder}; "
                "name their channels by --model.num_channels N, of 3 channels how they are scaled by --normalisation."
            )
        raise InputError(
            f"`train_dir`: expected image files ({', '.join(sorted(IMAGE_SUFFIXES))}) below {folder}, found none; "
            "parquet files are read by --dataset_name."
        )
    paths = names.below(folder)
    source = fingerprinted(root.resolve().name, len(paths), partial(_read_file, paths), None)
    digest = hashlib.sha256()
    names.update(digest)
    fingerprint = f"{digest.hexdigest()[:16]}/{source.fingerprint}"
    return replace(source, fingerprint=fingerprint, file_names=names, paths=paths)


def _read_file(paths: Sequence[str], index: int) -> bytes:
    return Path(paths[index]).read_bytes()


def load_splits(name: str, config: str | None, *, streaming: bool = False) -> dict[str, Any]:
    """Return the splits of a Hub dataset or a local folder, by name.

    Raises:
        InputError: It cannot be loaded.
    """
    import datasets

    if os.path.exists(name) and (not os.path.isdir(name) or not os.listdir(name)):
        raise InputError(f"`dataset_name`: expected a folder with data files, got {name}, which is empty or a file.")
    if os.path.sep in name and not os.path.exists(name) and name.count("/") != 1:
        raise InputError(f"`dataset_name`: expected a Hub id or an existing folder, got {name}, which does not exist.")
    saved = any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_info.json", "dataset_dict.json"))
    if saved and streaming:
        raise InputError(f"`streaming`: expected parquet files or a Hub id, got {name}, which is read without it.")
    trouble = None if os.path.exists(name) else hub_trouble(name)
    try:
        with without_hub() if trouble else nullcontext():
            if saved:
                loaded = datasets.load_from_disk(name)
            else:
                loaded = datasets.load_dataset(name, config, streaming=streaming)
    except IndexError as error:  # a split that was saved to disk without a row
        raise InputError(f"`dataset_name`: expected images in every split of {name}, found an empty one.") from error
    except Exception as error:  # the library raises dozens of kinds for what is all the same to a user
        if trouble:
            raise InputError(
                f"`dataset_name`: cannot load {name}: there is no folder of that name here, nothing of it in the "
                f"cache, and {trouble}."
            ) from error
        if type(error).__name__ in ("DataFilesNotFoundError", "EmptyDatasetError") and os.path.isdir(name):
            raise InputError(
                f"`dataset_name`: expected images, or parquet files that hold some, in {name}, found none."
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"`dataset_name`: cannot load {name}: {type(error).__name__}: {reason}") from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def image_column_of(name: str, features: Any, image_column: str | None) -> str:
    """Return the column of images among a dataset's features: the one asked for, or the only one.

    Raises:
        InputError: There is no such column, or none or several to choose from.
    """
    import datasets

    image_columns = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    if image_column is None:
        if not image_columns:
            raise InputError(
                f"`dataset_name`: expected a column of images in {name}, found {sorted(features)}; files of images "
                f"end in {', '.join(sorted(IMAGE_SUFFIXES))}."
            )
        if len(image_columns) != 1:
            raise InputError(
                f"`image_column_name`: expected one image column in {name}, found {image_columns} among "
                f"{sorted(features)}; name it with --image_column_name."
            )
        image_column = image_columns[0]
    elif image_column not in image_columns:
        raise InputError(
            f"`image_column_name`: expected one of the image columns {image_columns} of {name}, got {image_column!r}."
        )
    return image_column


def dataset_source(
    name: str, dataset: Any, image_column: str | None, label_column: str | None, *, said: bool = False
) -> ImageSource:
    """Return the images of a split; which column they are in is logged, if it was not `said` of another split.

    Raises:
        InputError: No or several image columns, an unknown column, labels that are no class indices, or no rows.
    """
    import datasets

    image_column = image_column_of(name, dataset.features, image_column)
    if len(dataset) == 0:
        raise InputError(f"`dataset_name`: expected images in {name}, found an empty split.")
    labels = _labels(name, dataset, label_column)
    # bytes, not decoded images: one corrupt file must not end the run
    encoded = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    source = os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
    if not said:
        logger.info("dataset %s: image column %r, labels %s", source, image_column, "found" if labels else "not used")
    found = fingerprinted(source, len(dataset), partial(_read_row, encoded, image_column), labels)
    names = getattr(dataset.features.get(label_column or "label"), "names", None)
    return replace(found, label_names=names if labels is not None else None)


def _read_row(encoded: Any, column: str, index: int) -> bytes:
    entry = encoded[index][column]
    if entry is None:
        raise OSError("no image in this row")
    return entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()


def _labels(name: str, dataset: Any, column: str | None) -> list[int] | None:
    """Return class indices, or None without a usable column; one that was asked for has to be usable."""
    if column is None and "label" not in dataset.features:
        return None
    if column is not None and column not in dataset.features:
        raise InputError(f"`label_column_name`: expected one of {sorted(dataset.features)} in {name}, got {column!r}.")
    labels = list(dataset[column or "label"])
    # hidden labels of a competition's test split are stored as -1
    if all(isinstance(one, int) and one >= 0 for one in labels):
        return labels
    unusable = next(one for one in labels if not (isinstance(one, int) and one >= 0))
    if column is not None:
        raise InputError(
            f"`label_column_name`: expected class indices from 0 on in column {column!r} of {name}, got {unusable!r}."
        )
    logger.info("dataset %s: column 'label' holds %r, no class index; it is not used for k-NN", name, unusable)
    return None
