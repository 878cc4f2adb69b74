"""Annotated images of a task: two splits, checked for what any task needs."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import source_for
from hf_vicreg.training.images.order import MAX_SUBSTITUTES
from hf_vicreg.training.images.sources import ImageSource, dataset_source, load_splits
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.run.arguments import ViewsConfig
from hf_vicreg.training.tasks.arguments import CaptioningArguments, DenseArguments, LabelArguments, TaskArguments


@dataclass(frozen=True)
class AnnotatedImages:
    """A split: images, and for each what the task says of it.

    Attributes:
        split: Its name.
        source: The images.
        annotations: One an image.
        fingerprint: Changes with any byte of any image, their order and the annotations.
        digests: One hash an image, of its encoded bytes.
    """

    split: str
    source: ImageSource
    annotations: list[Any]
    fingerprint: str
    digests: list[bytes]

    def __len__(self) -> int:
        return len(self.source)


def read_for(processor: BaseImageProcessor, images: AnnotatedImages) -> AnnotatedImages:
    """Return images read as an image processor takes them: with all their channels, where it takes such."""
    return replace(images, source=source_for(processor, images.source))


def load_annotated(
    arguments: TaskArguments | DenseArguments, column: str, field: str
) -> tuple[tuple[AnnotatedImages, Any], tuple[AnnotatedImages, Any]]:
    """Return the training and the test split, each with the `datasets` feature of its annotations.

    Args:
        arguments: Which data.
        column: Of the annotations.
        field: The flag that names the column.

    Raises:
        InputError: No such split or column, or nothing in it, and what `load_splits` refuses.
    """
    name = arguments.dataset_name
    splits = load_splits(name, arguments.dataset_config_name)
    others = [one for one in ("test", "validation") if one in splits and one != arguments.train_split]
    test_split = arguments.test_split or next(iter(others), None)
    if test_split is None:
        raise InputError(
            f"`test_split`: expected a split `test` or `validation` beside {arguments.train_split!r} in {name}, found "
            f"{sorted(splits)}; name the one to test on with --test_split."
        )
    both: list[tuple[AnnotatedImages, Any]] = []
    for flag, split, limit in (
        ("train_split", arguments.train_split, arguments.max_train_samples),
        ("test_split", test_split, arguments.max_test_samples),
    ):
        if split not in splits:
            raise InputError(f"`{flag}`: expected one of {sorted(splits)} in {name}, got {split!r}.")
        if column not in splits[split].features:
            raise InputError(
                f"`{field}`: expected a column {column!r} in split {split!r} of {name}, found "
                f"{sorted(splits[split].features)}; name it with --{field}."
            )
        rows = splits[split]
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        annotations, images = _annotations(rows, column)
        source = dataset_source(name, images, arguments.image_column_name, None, said=bool(both))
        digests = [_digest(source, split, index) for index in range(len(source))]
        whole = hashlib.sha256(b"".join(digests) + repr(annotations).encode()).hexdigest()[:16]
        both.append((AnnotatedImages(split, source, annotations, whole, digests), rows.features[column]))
    return both[0], both[1]


def _annotations(rows: Any, column: str) -> tuple[list[Any], Any]:
    """Return a column's values, the encoded bytes of images (None: missing), and rows whose images are no annotations.

    Files are read here: a fingerprint is of what is in them, not of where they lie.
    """
    import datasets

    if not isinstance(rows.features[column], datasets.Image):
        return list(rows.select_columns([column])[column]), rows
    encoded = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    others = [one for one, kind in rows.features.items() if isinstance(kind, datasets.Image) and one != column]
    return [_encoded(row[column]) for row in encoded], rows.remove_columns([column]) if others else rows


def _encoded(entry: Any) -> bytes | None:
    try:
        return entry and (entry["bytes"] or Path(entry["path"]).read_bytes())
    except OSError:  # said with its row by whoever needs it
        return None


def first_readable(
    source: ImageSource, wanted: int, draws: Callable[[int], int], attempts: int
) -> tuple[int, Any] | None:
    """Return index and image of the wanted row, or of the first readable one of those drawn in its place."""
    for attempt in range(attempts):
        index = draws(len(source)) if attempt else wanted
        image = source.read(index)
        if image is not None:
            return index, image
    return None


class TargetViews(Dataset):
    """Training samples for (epoch, index); all randomness depends on (seed, epoch, index) alone."""

    def __init__(
        self,
        source: ImageSource,
        targets: Sequence[torch.Tensor],
        image_size: tuple[int, int],
        arguments: CaptioningArguments | LabelArguments,
    ):
        """Take one target an image, (height, width) in pixels, and how images are cropped."""
        self.source, self.targets, self.seed = source, targets, arguments.seed
        # views without colours: what is said of an image may name them
        views = ViewsConfig(
            crop_min_ratio=arguments.crop_min_ratio,
            flip_probability=arguments.flip_probability,
            jitter_probability=0.0,
            grayscale_probability=0.0,
            blur_probability=0.0,
            solarize_probability=0.0,
        )
        self.sampler = ViewSampler.of_views(views, image_size)[0]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | None:
        """Return `crop` `(channels, height, width)`, `colours` and `labels`, the image's target.

        An unreadable image is replaced by another one with its target; None when too many are.
        """
        epoch, wanted = key
        substitutes = random.Random(f"{self.seed}/{epoch}/{wanted}/substitute")
        found = first_readable(self.source, wanted, substitutes.randrange, MAX_SUBSTITUTES)
        if found is None:
            return None
        index, image = found
        crop, colours = self.sampler(image, random.Random(f"{self.seed}/{epoch}/{wanted}/0"))
        return {"crop": crop, "colours": torch.tensor(colours), "labels": self.targets[index]}


def _digest(source: ImageSource, split: str, index: int) -> bytes:
    try:
        return hashlib.sha256(source.read_bytes(index)).digest()
    except OSError as error:  # passed over later; its own, or two such images would count as the same one
        return f"{type(error).__name__}/{split}/{index}".encode()
