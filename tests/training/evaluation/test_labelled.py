"""Labelled splits: numbered by name, counted, fingerprinted, and refused in one line where they cannot work."""

import logging

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import KnnArguments
from hf_vicreg.training.evaluation.labelled import count_overlap, load_labelled


def images(count, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


def split(labels, seed=0, column="label", feature=None):
    rows = datasets.Dataset.from_dict({"image": images(len(labels), seed), column: labels})
    rows = rows.cast_column("image", datasets.Image())
    return rows if feature is None else rows.cast_column(column, feature)


@pytest.fixture
def folder(tmp_path):
    """Returns a function that writes splits and returns the flags that name them."""

    def write(**splits):
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "data", num_shards=dict.fromkeys(splits, 1))
        return KnnArguments(dataset_name=str(tmp_path / "data"))

    return write


def test_names_are_numbered_alike_in_both_splits(folder):
    train, test = load_labelled(folder(train=split(["owl", "cat", "owl"]), test=split(["owl", "cat"], seed=1)))
    assert (train.labels, test.labels, train.class_names) == ([1, 0, 1], [1, 0], ["cat", "owl"])
    one, other = datasets.ClassLabel(names=["b", "a"]), datasets.ClassLabel(names=["a", "b"])
    train, test = load_labelled(
        folder(train=split([0, 1], feature=one), validation=split([0, 1], seed=1, feature=other))
    )
    assert (train.class_names, train.labels, test.labels) == (["b", "a"], [0, 1], [1, 0])
    assert test.split == "validation"


def test_integers_without_names_are_classes_by_their_values(folder):
    train, test = load_labelled(folder(train=split([200_000, 3, 4]), test=split([3, 200_000], seed=1)))
    assert (train.labels, test.labels) == ([2, 0, 1], [0, 2])
    assert train.class_names == test.class_names == ["3", "4", "200000"]


def test_integers_beside_names_are_their_indices(folder):
    named = datasets.ClassLabel(names=["b", "a"])
    train, test = load_labelled(folder(train=split([0, 1], feature=named), test=split([1, 1], seed=1)))
    assert (train.class_names, train.labels, test.labels) == (["b", "a"], [0, 1], [1, 1])
    digits = datasets.ClassLabel(names=["7", "5"])
    train, test = load_labelled(folder(train=split([5, 7]), test=split([0, 1], seed=1, feature=digits)))
    assert (train.class_names, train.labels, test.labels) == (["5", "7"], [0, 1], [1, 0])


def test_overlap_is_counted_and_warned_of(folder, caplog):
    train, test = load_labelled(folder(train=split([0, 1, 0, 1]), test=split([0, 1, 1])))
    with caplog.at_level(logging.WARNING):
        assert count_overlap(train.digests, test.digests) == 3
    assert "3 of the 3 test images are byte for byte among the training images" in caplog.text
    train, test = load_labelled(folder(train=split([0, 1]), test=split([0, 1], seed=1)))
    caplog.clear()
    assert count_overlap(train.digests, test.digests) == 0
    assert not caplog.records


def test_fingerprint_is_of_every_image_not_of_labels(folder):
    first, _ = load_labelled(folder(train=split([0, 1] * 50), test=split([0])))
    again, _ = load_labelled(folder(train=split([1, 0] * 50), test=split([0])))
    assert first.fingerprint == again.fingerprint
    chosen = first.select([3, 1])
    assert [chosen.source.read(0), chosen.source.read(1)] == [first.source.read(3), first.source.read(1)]
    assert (chosen.labels, chosen.digests) == ([1, 1], [first.digests[3], first.digests[1]])
    assert first.select(range(99)).fingerprint != first.fingerprint


def test_draws_are_balanced_and_differ_by_seed(folder):
    train, _ = load_labelled(folder(train=split([0] * 30 + [1] * 10), test=split([0])))
    for amount, expected in ((3, [3, 3]), (0.1, [3, 1]), (0.001, [1, 1]), (1.0, [30, 10])):
        drawn = [train.labels[index] for index in train.draw(amount, seed=0)]
        assert [drawn.count(0), drawn.count(1)] == expected
    assert train.draw(3, seed=0) == train.draw(3, seed=0)
    assert len({tuple(train.draw(3, seed)) for seed in range(5)}) > 1
    with pytest.raises(InputError, match="expected at most 10 images, which is all of class '1', got 11 a class"):
        train.draw(11, seed=0)


GOOD = [0, 1]


@pytest.mark.parametrize(
    ("splits", "changes", "message"),
    [
        (
            {"train": split(GOOD, column="kind"), "test": split(GOOD, column="kind")},
            {},
            "a column 'label' with labels",
        ),
        (
            {"train": split([1, 1]), "test": split([1])},
            {},
            "at least 2 classes among the 2 training images, found only",
        ),
        ({"train": split(GOOD, column="score")}, {}, "`label_column_name`: expected a column 'label'"),
        ({"train": split(GOOD), "test": split([])}, {}, "`test_split`: expected images in split 'test'"),
        ({"train": split([]), "test": split(GOOD)}, {}, "`train_split`: expected images in split 'train'"),
        ({"train": split(GOOD)}, {}, "expected a split `test` or `validation`"),
        ({"train": split(GOOD), "test": split([0, -1])}, {}, "split 'test', got -1"),
        ({"train": split([0, None]), "test": split(GOOD)}, {}, "or class names in column 'label' of"),
        ({"train": split([0.5, 1.5]), "test": split(GOOD)}, {}, "got 0.5"),
        ({"train": split(["a", "b"]), "test": split(["c", "a"])}, {}, "got 'c'"),
        ({"train": split([0, 7]), "test": split([0, 1])}, {}, "one of the 2 classes of the training images in column"),
        (
            {"train": split(GOOD), "test": split(GOOD)},
            {"test_split": "train"},
            "expected another split than the 'train'",
        ),
        ({"train": split(GOOD), "test": split(GOOD)}, {"train_split": "all"}, "`train_split`: expected one of"),
        ({"train": split(GOOD), "test": split(GOOD)}, {"max_train_samples": 1}, "at least 2 classes among the 1"),
    ],
    ids=[
        "no-column",
        "one-class",
        "no-labels",
        "empty-test",
        "empty-train",
        "no-test",
        "hidden",
        "missing",
        "floats",
        "unknown-name",
        "unknown-number",
        "same-split",
        "no-split",
        "one-image",
    ],
)
def test_bad_labels_get_one_line(folder, splits, changes, message):
    arguments = folder(**splits)
    for name, value in changes.items():
        setattr(arguments, name, value)
    with pytest.raises(InputError) as caught:
        load_labelled(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_split_saved_without_a_row_gets_one_line(tmp_path):
    datasets.DatasetDict({"train": split(GOOD), "test": split([])}).save_to_disk(tmp_path / "data")
    with pytest.raises(InputError, match=r"expected images in every split of .*, found an empty one"):
        load_labelled(KnnArguments(dataset_name=str(tmp_path / "data")))
