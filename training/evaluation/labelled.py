"""Labelled images to evaluate on: checked, with class names, and fingerprinted by all of their bytes."""

import csv
import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hf_vicreg.training.errors import InputError, blamed_on
from hf_vicreg.training.evaluation.arguments import LabelledDataArguments
from hf_vicreg.training.images.files.labelled_tars import labelled_tars
from hf_vicreg.training.images.sources import ImageSource, dataset_source, load_sources, load_splits
from hf_vicreg.training.run.places import data_setting, is_shards, refuse_credentials

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledImages:
    """A split.

    Attributes:
        split: Its name.
        source: The images, with a class index each.
        class_names: One for each class index.
    """

    split: str
    source: ImageSource
    class_names: list[str]

    @property
    def labels(self) -> list[int]:
        """One class index an image."""
        assert self.source.labels is not None
        return self.source.labels

    @cached_property
    def digests(self) -> list[bytes]:
        """One hash an image, of its encoded bytes."""
        found = []
        for index in range(len(self.source)):
            try:
                found.append(hashlib.sha256(self.source.read_bytes(index)).digest())
            except OSError as error:
                # its own, or two unreadable images would count as the same one
                found.append(f"{type(error).__name__}/{self.split}/{index}".encode())
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any byte of any image and with their order, not with their labels."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest()[:16]

    def select(self, indices: Sequence[int]) -> "LabelledImages":
        """Return the images at `indices`, in that order."""
        return LabelledImages(self.split, self.source.select(indices), self.class_names)

    def draw(self, amount: float | int, seed: int) -> list[int]:
        """Return indices of images drawn class by class, in the split's order; the same for the same seed.

        Args:
            amount: A number of images of each class, or, as a float, a share of each class, at least one image.
            seed: Of the draw.

        Raises:
            InputError: A class with fewer images.
        """
        by_class: dict[int, list[int]] = {}
        for index, label in enumerate(self.labels):
            by_class.setdefault(label, []).append(index)
        chosen = []
        for label, indices in sorted(by_class.items()):
            count = amount if isinstance(amount, int) else max(1, round(amount * len(indices)))
            if count > len(indices):
                raise InputError(
                    f"`labels`: expected at most {len(indices)} images, which is all of class "
                    f"{self.class_names[label]!r}, got {amount} a class."
                )
            chosen += random.Random(f"{seed}/{amount}/{label}").sample(indices, count)
        return sorted(chosen)


def load_labelled(arguments: LabelledDataArguments) -> tuple[LabelledImages, LabelledImages]:
    """Return the training and the test split.

    Class names in a column of strings are numbered in alphabetical order of the training split, integers without names
    in their own: values that do not occur are no classes.

    Raises:
        InputError: No labels, one class only, an empty or missing split, and what `load_sources` refuses.
    """
    name, column = arguments.dataset_name, arguments.label_column_name
    if arguments.labels_file is not None:
        train, test = _from_file(arguments, arguments.labels_file)
    elif is_shards(name):
        train, test = _from_tars(name, arguments.test_split, column)
    elif name == "digits":
        digits, held_out = load_sources(dataset_name=name)
        assert held_out is not None
        names = [str(digit) for digit in range(10)]
        train, test = LabelledImages("train", digits, names), LabelledImages("test", held_out, names)
    else:
        splits = load_splits(name, arguments.dataset_config_name)
        test_split = arguments.test_split or next((one for one in ("test", "validation") if one in splits), None)
        if test_split is None:
            if arguments.train_split in splits:  # without labels, that is what to say
                _classes(name, splits[arguments.train_split], column)
            raise InputError(
                f"`test_split`: expected a split `test` or `validation` in {name}, found {sorted(splits)}; name the "
                "one to test on with --test_split."
            )
        for field, split in (("train_split", arguments.train_split), ("test_split", test_split)):
            if split not in splits:
                raise InputError(f"`{field}`: expected one of {sorted(splits)} in {name}, got {split!r}.")
            if len(splits[split]) == 0:
                raise InputError(f"`{field}`: expected images in split {split!r} of {name}, found it empty.")
        if arguments.train_split == test_split:
            raise InputError(f"`test_split`: expected another split than the {test_split!r} trained on.")
        classes = _classes(name, splits[arguments.train_split], column)
        numbered = {
            split: _numbered(name, split, splits[split], column, classes)
            for split in (arguments.train_split, test_split)
        }
        train, test = (
            LabelledImages(
                split,
                dataset_source(name, rows, arguments.image_column_name, column, said=split == test_split),
                [str(one) for one in classes],
            )
            for split, rows in numbered.items()
        )
    train = replace(train, source=train.source.first(arguments.max_train_samples))
    test = replace(test, source=test.source.first(arguments.max_test_samples))
    present = sorted(set(train.labels))
    if len(present) < 2:
        raise InputError(
            f"`label_column_name`: expected at least 2 classes among the {len(train.source)} training images, found "
            f"only {train.class_names[present[0]]!r}; take another column or more images."
        )
    unknown = sorted(set(test.labels) - set(present))
    if unknown:
        logger.warning(
            "%d classes of the test images are not among the training images and cannot be found, %s for one",
            len(unknown),
            repr(test.class_names[unknown[0]]),
        )
    logger.info(
        "%s: %d training and %d test images of %d classes", name, len(train.source), len(test.source), len(present)
    )
    return train, test


def _from_file(arguments: LabelledDataArguments, path: str) -> tuple[LabelledImages, LabelledImages]:
    """Return the images of a set that a file gives labels and splits.

    Raises:
        InputError: No such columns, an image that is not in the set or stands there twice, no label, another split, or
            another image than that whose digest is given.
    """
    digests: dict[str, str | None] = {}
    splits: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    columns = ("file_name", "label", "split")
    with (
        blamed_on("labels_file", f"expected a CSV file, got {path}"),
        open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file,
    ):
        try:
            for number, row in enumerate(csv.DictReader(file, strict=True), 1):
                wrong = [one for one in columns if not row.get(one)]
                if wrong or row["split"] not in splits or any(row["file_name"] in one for one in splits.values()):
                    raise InputError(
                        f"`labels_file`: expected {', '.join(columns)} (train or test) in every row of {path}, each "
                        f"image once, found row {number}: {[row.get(one) for one in columns]}."
                    )
                splits[row["split"]][row["file_name"]] = row["label"]
                digests[row["file_name"]] = row.get("digest")
        except csv.Error as error:
            raise ValueError(error) from error
    for split, found in splits.items():
        if not found:
            raise InputError(f"`labels_file`: expected images of split {split!r} in {path}, found none.")
    where, columns_of = data_setting(arguments.dataset_name, {}), ("dataset_config_name", "image_column_name")
    named = {one: getattr(arguments, one) for one in (*columns_of, "train_split")}
    source = replace(load_sources(**where, **named)[0], label_names=None)
    places = {source.describe(index): index for index in range(len(source))}
    for one, digest in digests.items():
        if digest and one in places and source.digest(places[one]).hex() != digest:
            raise InputError(
                f"`labels_file`: expected {one} of {arguments.dataset_name} as it was labelled in {path}, found "
                f"another image in split {arguments.train_split!r}; name its data set, and its split by --train_split."
            )
    number_of = {name: number for number, name in enumerate(sorted(set(splits["train"].values())))}
    images = []
    for split, found in splits.items():
        unknown = next((one for one in found if one not in places), None)
        new = next((one for one in found.values() if one not in number_of), None)
        if unknown is not None or new is not None:
            raise InputError(
                f"`labels_file`: expected images of {arguments.dataset_name}, in split 'test' of the classes of split "
                f"'train', found {unknown if new is None else new!r} in split {split!r} of {path}."
            )
        labels = [0] * len(source)
        for one, label in found.items():
            labels[places[one]] = number_of[label]
        labelled = LabelledImages(split, replace(source, labels=labels), list(number_of))
        images.append(labelled.select(sorted(places[one] for one in found)))
    return images[0], images[1]


def _from_tars(pattern: str, test_pattern: str | None, column: str) -> tuple[LabelledImages, LabelledImages]:
    """Return images of tars to train and to test on, with the classes as training has them; errors as above."""
    from datasets import Dataset

    images, known = list[LabelledImages](), list[Any]()
    for field, one in (("dataset_name", pattern), ("test_split", test_pattern)):
        refuse_credentials(one or "", field)
        if one is None or not one.lower().endswith(".tar") or (images and one == pattern):
            raise InputError(
                f"`{field}`: expected tars, others to test on than to train on, got {one!r}; name them as in "
                "--dataset_name 'train-*.tar' --test_split 'test-*.tar', and tables by their folder."
            )
        source, classes = labelled_tars(one, field, column)
        rows = Dataset.from_dict({"__key__": source.file_names, column: classes})
        known = known or _classes(source.name, rows, column)
        labels = list(_numbered(source.name, source.name, rows, column, known)[column])
        images.append(LabelledImages(source.name, replace(source, labels=labels), [str(one) for one in known]))
    return images[0], images[1]


def count_overlap(train: Sequence[bytes], test: Sequence[bytes]) -> int:
    """Return how many test images are byte for byte among the training images, by their digests; warns of them."""
    known = set(train)
    count = sum(digest in known for digest in test)
    if count:
        logger.warning(
            "%d of the %d test images are byte for byte among the training images: the figures flatter",
            count,
            len(test),
        )
    return count


def _classes(name: str, dataset: Any, column: str) -> list[Any]:
    """Return the classes of the training split, by index: their names, or integers where these have none.

    Raises:
        InputError: No such column, or one that holds no classes.
    """
    import datasets

    if column not in dataset.features:
        raise InputError(
            f"`label_column_name`: expected a column {column!r} with labels in {name}, found "
            f"{sorted(dataset.features)}; name it with --label_column_name."
        )
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    values = list(dataset[column])
    if all(isinstance(one, str) for one in values):
        return sorted(set(values))
    wrong = next((one for one in values if isinstance(one, bool) or not isinstance(one, int) or one < 0), None)
    if wrong is not None or not all(isinstance(one, int) for one in values):
        raise InputError(
            f"`label_column_name`: expected class indices from 0 on or class names in column {column!r} of {name}, "
            f"got {wrong!r}."
        )
    return sorted(set(values))


def _numbered(name: str, split: str, dataset: Any, column: str, classes: list[Any]) -> Any:
    """Return the split with its labels as indices into `classes`.

    Raises:
        InputError: A class that the training split does not know, or a missing label.
    """
    import datasets

    if column not in dataset.features:
        raise InputError(f"`label_column_name`: expected column {column!r} in split {split!r} of {name}, got none.")
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel) and list(feature.names) == classes:
        return dataset
    values = list(dataset[column])
    if isinstance(feature, datasets.ClassLabel):
        values = [None if one is None or one < 0 else feature.names[one] for one in values]
    number = {key: index for index, one in enumerate(classes) for key in (one, str(one))}
    kinds = (str, *map(type, classes[:1]))  # of classes with names, an integer is the index
    numbers = [number.get(one) if isinstance(one, kinds) else one for one in values]
    for value, one in zip(values, numbers, strict=True):
        if not isinstance(one, int) or not 0 <= one < len(classes):
            raise InputError(
                f"`label_column_name`: expected one of the {len(classes)} classes of the training images in column "
                f"{column!r} of split {split!r}, got {value!r}."
            )
    return dataset.remove_columns(column).add_column(column, numbers)
