"""Images with one class, several classes or numbers each: checked, and as targets of a classifier's loss."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import LabelledDataArguments
from hf_vicreg.training.evaluation.labelled import LabelledImages, load_labelled
from hf_vicreg.training.tasks.arguments import LabelArguments
from hf_vicreg.training.tasks.data import AnnotatedImages, load_annotated

Splits = tuple[AnnotatedImages, AnnotatedImages, list[str]]  # of training and test, annotated with tensors; names


def load_classes(arguments: LabelArguments) -> Splits:
    """Return both splits, annotated with one class `(1,)` int64 an image, and the names of the classes.

    Raises:
        InputError: A class without a training image, and what `load_labelled` refuses.
    """
    names = {one.name for one in dataclasses.fields(LabelledDataArguments)} & vars(arguments).keys()
    train, test = load_labelled(LabelledDataArguments(**{name: getattr(arguments, name) for name in names}))
    refuse_unseen(train.class_names, set(train.labels), "label_column_name")
    return _annotated(train), _annotated(test), train.class_names


def _annotated(images: LabelledImages) -> AnnotatedImages:
    whole = hashlib.sha256(f"{images.fingerprint} {images.labels}".encode()).hexdigest()[:16]
    targets = [torch.tensor([label]) for label in images.labels]
    return AnnotatedImages(images.split, images.source, targets, whole, images.digests)


def load_several_classes(arguments: LabelArguments) -> Splits:
    """Return both splits, annotated with 0 or 1 for each class, `(classes,)` float32, and the names of the classes.

    Names in a column of lists of strings are numbered in alphabetical order of the training split.

    Raises:
        InputError: A row that is no list, a class that is none or that no training image has, and what
            `load_annotated` refuses.
    """
    (train, feature), (test, _) = load_annotated(arguments, arguments.label_column_name, "label_column_name")
    for images in (train, test):
        for row, found in enumerate(images.annotations):
            if not isinstance(found, list):
                raise _wrong("a list of classes", found, row, images.split)
    names = _class_names(train, feature)
    numbers = {name: index for index, name in enumerate(names)}
    train, test = _marked(train, numbers), _marked(test, numbers)
    seen = torch.stack(train.annotations).amax(0).nonzero().flatten().tolist()
    refuse_unseen(names, set(seen), "label_column_name")
    return train, test, names


def _class_names(images: AnnotatedImages, feature: Any) -> list[str]:
    named = getattr(getattr(feature, "feature", None), "names", None)
    if named is not None:
        return list(named)
    found = [one for labels in images.annotations for one in labels]
    if found and all(isinstance(one, str) for one in found):
        return sorted(set(found))
    wrong = next((one for one in found if isinstance(one, bool) or not isinstance(one, int) or one < 0), None)
    if wrong is not None or not found:
        raise InputError(
            "`label_column_name`: expected class indices from 0 on or class names in the lists, got "
            f"{'none' if wrong is None else repr(wrong)[:60]}."
        )
    return [str(index) for index in range(max(found) + 1)]


def _marked(images: AnnotatedImages, numbers: dict[str, int]) -> AnnotatedImages:
    targets = []
    for row, labels in enumerate(images.annotations):
        target = torch.zeros(len(numbers))
        for label in labels:
            index = numbers.get(label) if isinstance(label, str) else label
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(numbers):
                raise _wrong(f"classes among the {len(numbers)} of the training images", label, row, images.split)
            target[index] = 1
        targets.append(target)
    return dataclasses.replace(images, annotations=targets)


def load_numbers(arguments: LabelArguments) -> Splits:
    """Return both splits, annotated with numbers `(outputs,)` float32, and a name for each output.

    Raises:
        InputError: A row without a finite number, lists of different lengths, an output that is the same for all
            training images, and what `load_annotated` refuses.
    """
    column = arguments.label_column_name
    (train, _), (test, _) = load_annotated(arguments, column, "label_column_name")
    first = train.annotations[0]
    count = len(first) if isinstance(first, list) else 1
    train, test = (_numbers(images, first, count) for images in (train, test))
    stacked = torch.stack(train.annotations)
    same = (stacked == stacked[0]).all(0).nonzero().flatten().tolist()  # by rounding, a deviation need not be 0
    if same:
        raise InputError(
            f"`label_column_name`: expected numbers that differ in column {column!r}, output {same[0]} is "
            f"{train.annotations[0][same[0]]:g} for all {len(train)} training images; leave it out."
        )
    return train, test, [column] if count == 1 else [f"{column}_{index}" for index in range(count)]


def _numbers(images: AnnotatedImages, first: Any, count: int) -> AnnotatedImages:
    wanted = f"a list of {count} numbers" if isinstance(first, list) else "a number"
    targets = []
    for row, found in enumerate(images.annotations):
        values = found if isinstance(found, list) else [found]
        right = all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)
        if isinstance(found, list) != isinstance(first, list) or len(values) != count or not right or not count:
            raise _wrong(wanted, found, row, images.split)
        targets.append(torch.tensor(values, dtype=torch.float64).float())
        if not targets[-1].isfinite().all():
            raise _wrong(f"{wanted}, finite in 32 bits", found, row, images.split)
    return dataclasses.replace(images, annotations=targets)


def refuse_unseen(names: Sequence[str], seen: set[int], field: str) -> None:
    """Raise InputError for classes that no training image has: a head for them would learn that they never occur."""
    unseen = [name for index, name in enumerate(names) if index not in seen]
    if unseen:
        raise InputError(
            f"`{field}`: expected training images of each of {len(names)} classes, found none of {unseen[0]!r}"
            f"{f' and {len(unseen) - 1} more' if len(unseen) > 1 else ''}; take them out of the column's names, or "
            "more images."
        )


def _wrong(expected: str, found: Any, row: int, split: str) -> InputError:
    return InputError(f"`label_column_name`: expected {expected}, got {str(found)[:60]!r} in row {row} of {split!r}.")
