"""Masks, crops, measures and windows of segmentation, each against a plain oracle."""

import random
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.tasks.arguments import SegmentationArguments
from hf_vicreg.training.tasks.segmentation.data import CropSampler, load_segmentation
from hf_vicreg.training.tasks.segmentation.masks import BORDER_WIDTH, IGNORED, OUTSIDE, classes_of, objects_of
from hf_vicreg.training.tasks.segmentation.measures import (
    average_precision,
    class_scores,
    confusion,
    object_counts,
)
from hf_vicreg.training.tasks.segmentation.windows import smooth_weight, starts, windowed_logits


def coded(height, width):
    """An image whose red and green are row and column, and a mask that tells the same."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8)
    return Image.fromarray(pixels), (1000 * rows + columns).astype(np.int32)


@pytest.mark.parametrize(("turns", "flip"), [(False, 0.0), (True, 0.0), (True, 1.0), (False, 1.0)])
@pytest.mark.parametrize("size", [(61, 83), (20, 90), (17, 19)])
def test_mask_and_image_of_a_crop_show_the_same_place(size, turns, flip):
    image, mask = coded(*size)
    sampler = CropSampler((32, 40), 0.3, flip, quarter_turns=turns)
    seen = set()
    for seed in range(8):
        pixels, numbers, (height, width) = sampler(image, mask, random.Random(seed))
        assert pixels.shape == (3, 32, 40)
        assert (numbers[height:] == OUTSIDE).all()
        assert (numbers[:, width:] == OUTSIDE).all()
        inside = numbers[:height, :width]
        assert (inside >= 0).all()
        # bilinear pixels lie within a pixel and a half of the nearest one, whatever was drawn
        for channel, told in ((0, inside // 1000), (1, inside % 1000)):
            assert (pixels[channel, :height, :width].int() - told).abs().max() <= 2
        seen.add(
            (bool(inside[0, 0] // 1000 <= inside[-1, 0] // 1000), bool(inside[0, 0] % 1000 <= inside[0, -1] % 1000))
        )
    if not turns:
        assert seen == {(True, flip == 0.0)}


def test_a_crop_takes_the_nearest_pixel_of_its_mask():
    image, mask = coded(50, 70)
    sampler, rng = CropSampler((16, 24), 0.25, 0.5), random.Random(3)
    _, numbers, _ = sampler(image, mask, random.Random(3))
    scale = rng.uniform(0.75, 1.25)
    top, left = rng.uniform(0, 50 - 16 / scale), rng.uniform(0, 70 - 24 / scale)
    expected = [
        [mask[int(top + (y + 0.5) / scale), int(left + (x + 0.5) / scale)] for x in range(24)] for y in range(16)
    ]
    if rng.random() < 0.5:
        expected = [row[::-1] for row in expected]
    assert numbers.tolist() == expected


def written_out_classes(mask):
    height, width = mask.shape
    classes = np.zeros(mask.shape, int)
    for y in range(height):
        for x in range(width):
            if mask[y, x] == OUTSIDE:
                classes[y, x] = IGNORED
            elif mask[y, x]:
                near = mask[
                    max(0, y - BORDER_WIDTH) : y + BORDER_WIDTH + 1, max(0, x - BORDER_WIDTH) : x + BORDER_WIDTH + 1
                ]
                classes[y, x] = 1 if set(near.ravel().tolist()) <= {mask[y, x], OUTSIDE} else 2
    return classes


def test_objects_become_interior_and_border_and_objects_again():
    mask = np.zeros((40, 53), np.int32)
    mask[3:17, 2:20], mask[3:17, 20:37], mask[25:40, 5:18], mask[25:33, 40:53] = 70001, 2, 9, 4
    mask[20:23, 45:48] = 5  # too thin for an interior
    whole = classes_of(torch.from_numpy(mask), instances=True).numpy()
    assert np.array_equal(whole, written_out_classes(mask))
    again = objects_of(whole)
    assert len(np.unique(again)) == 6
    assert all(len(np.unique(again[mask == number])) == 1 for number in np.unique(mask))
    padded = np.pad(mask, ((0, 3), (0, 5)), constant_values=OUTSIDE)
    classes = classes_of(torch.from_numpy(padded), instances=True).numpy()
    assert np.array_equal(classes, written_out_classes(padded))
    assert not objects_of(np.zeros((4, 4), int)).any()


def test_border_goes_to_an_object_of_its_own_part():
    classes = np.zeros((9, 30), int)
    classes[0:9, 0], classes[0:9, 2] = 2, 1  # a thin part without interior, and an interior nearby
    classes[4, 4:29], classes[4, 28] = 2, 1  # a long border whose start is nearer to the other interior
    objects = objects_of(classes)
    assert len(np.unique(objects)) == 4
    assert len(np.unique(objects[4, 4:29])) == 1
    assert len({objects[4, 0], objects[4, 2], objects[4, 28]}) == 3


def test_semantic_masks_stay_as_they_are():
    mask = torch.tensor([[0, 1, IGNORED], [2, OUTSIDE, 0]], dtype=torch.int32)
    assert classes_of(mask, instances=False).tolist() == [[0, 1, 255], [2, 255, 0]]


def test_measures_of_classes_equal_counting():
    rng = np.random.default_rng(0)
    truth, found = rng.choice([0, 1, 2, 255], (23, 31)), rng.integers(0, 4, (23, 31))
    scores = class_scores(confusion(truth, found, 4), ["a", "b", "c", "never"])
    assert list(scores) == ["a", "b", "c"]
    known = truth != 255
    for index, name in enumerate(scores):
        mine, theirs = (truth == index) & known, (found == index) & known
        shared = (mine & theirs).sum()
        assert scores[name]["iou"] == pytest.approx(shared / (mine | theirs).sum())
        assert scores[name]["dice"] == pytest.approx(2 * shared / (mine.sum() + theirs.sum()))


def test_measures_of_objects_equal_counting():
    rng = np.random.default_rng(1)
    truth = np.kron(rng.permutation(20).reshape(4, 5), np.ones((6, 6), int))
    found = np.where(rng.random(truth.shape) < 0.25, 0, truth + 7)
    found[:, 6:12] = rng.integers(0, 40, (24, 6))
    matched = 0
    for one in set(truth.ravel()) - {0}:
        for other in set(found.ravel()) - {0}:
            matched += ((truth == one) & (found == other)).sum() / ((truth == one) | (found == other)).sum() > 0.5
    others, ours = len(set(found.ravel()) - {0}), len(set(truth.ravel()) - {0})
    assert 0 < matched < ours
    counts = object_counts(truth, found)
    assert counts == (matched, others - matched, ours - matched)
    assert average_precision(np.array([counts, (1, 0, 2)])) == pytest.approx(
        (matched + 1) / (others + ours - matched + 3)
    )
    assert object_counts(np.zeros((3, 3), int), np.zeros((3, 3), int)) == (0, 0, 0)
    assert object_counts(np.ones((3, 3), int), np.zeros((3, 3), int)) == (0, 0, 1)
    assert average_precision(np.array([(0, 0, 0)])) == 1.0


@pytest.mark.parametrize("size", [(16, 24), (50, 61), (9, 70), (17, 24), (5, 5)])
def test_windows_of_a_model_of_single_pixels_equal_the_whole(size):
    pixels = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(1))

    def logits_of(batch):
        assert batch.shape[-2:] == (16, 24)
        return torch.nn.functional.conv2d(batch, weight).sin()

    # an average of equal numbers, rounded a few times in float32
    torch.testing.assert_close(
        windowed_logits(logits_of, pixels, (16, 24), batch_size=3), logits_of_whole(pixels, weight), rtol=0, atol=1e-5
    )


def logits_of_whole(pixels, weight):
    return torch.nn.functional.conv2d(pixels[None], weight).sin()[0]


def test_windows_of_a_model_that_knows_its_place_have_no_seams():
    """Each window gives its own number; the average moves from one to the next by small steps."""
    count = 0

    def logits_of(batch):
        nonlocal count
        numbers = torch.arange(count, count + len(batch)) % 2
        count += len(batch)
        return numbers.float().view(-1, 1, 1, 1).expand(-1, 1, *batch.shape[-2:])

    logits = windowed_logits(logits_of, torch.zeros(3, 16, 40), (16, 16))[0]
    assert logits.min() < 0.05
    assert logits.max() > 0.95
    # of two squared sines half a period apart the share moves by at most pi / 16 a pixel
    assert (logits[:, 1:] - logits[:, :-1]).abs().max() < 0.21


def test_windows_cover_what_they_shall():
    for length in range(1, 90):
        places = starts(length, 16)
        assert places[0] == 0
        assert places[-1] == max(0, length - 16)
        assert all(0 < after - before <= 8 for before, after in pairwise(places))
    assert (smooth_weight((7, 10)) > 0).all()


@pytest.fixture
def arguments(tmp_path):
    """Returns a function from masks, one an image of 12 by 10 pixels, and flags, to the flags of a dataset."""

    def make(masks, **flags):
        images = [Image.new("RGB", (12, 10), (30, 20 * number, 50)) for number in range(len(masks))]
        split = datasets.Dataset.from_dict({"image": images, "mask": masks})
        split = split.cast_column("image", datasets.Image())
        if any(isinstance(mask, Image.Image) for mask in masks):
            split = split.cast_column("mask", datasets.Image())
        datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "data")
        return SegmentationArguments(dataset_name=str(tmp_path / "data"), **flags)

    return make


def mask_of(*numbers, size=(10, 12), dtype=np.uint8):
    values = np.zeros(size, dtype)
    values.ravel()[: len(numbers)] = numbers
    return Image.fromarray(values)


def test_classes_are_counted_or_named(arguments):
    train, test, names = load_segmentation(arguments([mask_of(1, 2, IGNORED), mask_of(0)]))
    assert (len(train), len(test), names) == (2, 2, ["0", "1", "2"])
    again, _, _ = load_segmentation(arguments([mask_of(1, 2, IGNORED), mask_of(0)]))
    assert again.fingerprint == train.fingerprint
    other, _, _ = load_segmentation(arguments([mask_of(1, 2, 0), mask_of(0)]))
    assert other.fingerprint != train.fingerprint
    assert load_segmentation(arguments([mask_of(1)], class_names="sky, bird,tree"))[2] == ["sky", "bird", "tree"]
    numbered = load_segmentation(arguments([mask_of(300, 70, dtype=np.uint16)], instances=True))
    assert numbered[2] == ["background", "interior", "border"]


@pytest.mark.parametrize(
    ("masks", "flags", "message"),
    [
        ([mask_of(1), mask_of(1, size=(12, 10))], {}, "its image's size, 12x10 pixels, got 10x12 in row 1 of 'train'"),
        (
            [mask_of(1, 3)],
            {"class_names": "a,b"},
            "masks of the 2 classes 0 to 1, and 255 where unknown, got 3 in row 0",
        ),
        ([mask_of(0, 300, dtype=np.uint16)], {}, "`class_names`: expected masks of the 255 classes"),
        (
            [mask_of(1)],
            {"mask_column_name": "masks"},
            "`mask_column_name`: expected a column 'masks' in split 'train'",
        ),
        (["a", "b"], {}, "`mask_column_name`: expected a column of images, 'mask' in 'train' is none"),
        ([mask_of(1), None], {}, "one whole number a pixel for each image, got none in row 1 of 'train'"),
        ([Image.new("RGB", (12, 10))], {}, "got an image of mode RGB in row 0"),
        ([mask_of(0)], {}, "`train_split`: expected at least two classes in 'train', found 0 everywhere"),
        ([mask_of(0)], {"instances": True}, "`train_split`: expected objects in the masks of 'train', found none"),
        ([mask_of(1)], {"class_names": "a"}, "`class_names`: expected 2 to 255 names that differ"),
        ([mask_of(1)], {"class_names": "a,b", "instances": True}, "`class_names`: expected none with --instances"),
    ],
    ids=["size", "beyond", "numbers", "column", "texts", "none", "colours", "empty", "objects", "one-name", "both"],
)
def test_bad_masks_get_one_line(masks, flags, message, arguments):
    with pytest.raises(InputError) as caught:
        load_segmentation(arguments(masks, **flags))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
