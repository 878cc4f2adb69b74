"""Images with boxes: bad ones refused in one line, and views whose boxes stay on their objects."""

import random

import datasets
import pytest
import torch
from PIL import Image
from transformers import DeformableDetrImageProcessor

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.labelled import count_overlap
from hf_vicreg.training.tasks.arguments import DetectionArguments
from hf_vicreg.training.tasks.detection.command import collate, model_inputs
from hf_vicreg.training.tasks.detection.data import CanvasSampler, DetectionViews, Objects, load_detection

WIDTH, HEIGHT = 64, 48
GOOD = {"bbox": [[4.0, 6.0, 20.0, 10.0], [40.0, 20.0, 25.0, 28.0]], "category": ["ball", "box"]}


def image(number, size=(WIDTH, HEIGHT)):
    pixels = torch.randint(
        0, 256, (*size[::-1], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
    )
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def arguments(tmp_path):
    """Returns a function from objects of the training images (and of the test image) to the flags of a dataset."""

    def make(train, test=GOOD, **flags):
        splits = {
            name: datasets.Dataset.from_dict(
                {"image": [image(number + shift) for number in range(len(rows))], "objects": rows}
            ).cast_column("image", datasets.Image())
            for name, rows, shift in (("train", train, 0), ("test", [test], 100))
        }
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
        return DetectionArguments(dataset_name=str(tmp_path / "data"), **flags)

    return make


def test_names_boxes_and_classes(arguments):
    train, test, names = load_detection(arguments([GOOD, {"bbox": [], "category": []}]))
    assert names == ["ball", "box"]
    assert train.annotations[0].categories.tolist() == [0, 1]
    # the second box ends a pixel outside: cut
    assert train.annotations[0].boxes.tolist() == [[4, 6, 20, 10], [40, 20, 24, 28]]
    assert train.annotations[1].boxes.shape == (0, 4)
    assert count_overlap(train.digests, test.digests) == 0
    assert count_overlap(train.digests, train.digests) == 2


def test_a_list_of_objects_is_the_same_as_lists_of_their_parts(arguments, tmp_path):
    expected, _, _ = load_detection(arguments([GOOD]))
    rows = [{"bbox": box, "category": name} for box, name in zip(*GOOD.values(), strict=True)]
    (tmp_path / "other").mkdir()
    found, _, names = load_detection(arguments([rows], test=rows))
    assert names == ["ball", "box"]
    assert torch.equal(found.annotations[0].boxes, expected.annotations[0].boxes)


STRICT = {"strict_boxes": True}


def objects(box=(4.0, 6.0, 20.0, 10.0), category="ball", **extra):
    return {"bbox": [list(box)], "category": [category], **extra}


@pytest.mark.parametrize(
    ("train", "test", "flags", "message"),
    [
        ([objects((50, 6, 20, 10))], GOOD, STRICT, "boxes that lie inside the image of 64x48 pixels, got [50"),
        ([objects((4, -3, 20, 10))], GOOD, STRICT, "in row 0 of 'train'; boxes are (x, y, width, height) in pixels"),
        ([objects()], objects((4, 6, 20, 43.5)), STRICT, "in row 0 of 'test'"),
        ([objects((0.1, 0.2, 0.3, 0.4))], GOOD, {}, "boxes in pixels, got all 1 boxes in 'train' at most one"),
        ([objects((4, 6, 0, 10))], GOOD, STRICT, "expected boxes that have a width and a height above 0"),
        ([objects((4, 6, float("nan"), 10))], GOOD, STRICT, "expected boxes that consist of finite numbers"),
        ([objects((4, 6, 10))], GOOD, {}, "expected boxes of four numbers"),
        ([{"bbox": [[1.0, 2.0, 3.0, 4.0]] * 2, "category": ["ball"]}], GOOD, {}, "as many boxes as categories, got 2"),
        ([{"bbox": [[1.0, 2.0, 3.0, 4.0]]}], GOOD, {}, "expected `category` for each object, found ['bbox']"),
        ([{"category": ["ball"]}], GOOD, {}, "expected `bbox` for each object, found ['category']"),
        ([objects(category=-1)], objects(category=0), {}, "categories as indices from 0 on or as names, got -1"),
        ([{"bbox": [], "category": []}], GOOD, {}, "or as names, got none"),
        ([objects()], GOOD, {}, "one of the 1 categories of the training images, got 'box' in row 0 of 'test'"),
        ([objects()], {"bbox": [], "category": []}, {}, "`test_split`: expected objects on the 1 images of 'test'"),
        ([GOOD], GOOD, {"num_queries": 1}, "`num_queries`: expected at least the 2 objects"),
        ([GOOD], GOOD, {"objects_column_name": "boxes"}, "expected a column 'boxes' in split 'train'"),
        ([GOOD], GOOD, {"objects_column_name": "image"}, "`objects_column_name`: expected"),
        ([objects((64.2, 6, 0.5, 10))], GOOD, STRICT, "pixels, got [64.2, 6.0, 0.5, 10.0] in row 0 of 'train'"),
        ([{"bbox": [1.0, 2.0, 3.0, 4.0], "category": 0}], GOOD, {}, "`objects_column_name`: expected a list of"),
        ([GOOD], GOOD, {"train_split": "test"}, "`test_split`: expected a split `test` or `validation` beside 'test'"),
        ([GOOD], GOOD, {"test_split": "validation"}, "`test_split`: expected one of ['test', 'train']"),
    ],
    ids=[
        "right", "top", "bottom", "shares", "no-area", "nan", "three", "unequal", "no-category", "no-bbox", "negative",
        "empty", "unknown", "empty-test", "queries", "column", "beyond", "one-object", "one-split",
        "wrong-column", "split",
    ],
)  # fmt: skip
def test_bad_objects_are_refused_in_one_line(arguments, train, test, flags, message):
    with pytest.raises(InputError) as caught:
        load_detection(arguments(train, test, **flags))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_boxes_that_are_not_right_are_cut_or_left_out_counted_and_listed(arguments, caplog):
    given = {
        "bbox": [[-5.0, 6, 20, 10], [4, 6, 0, 10], [50, 40, 30, 30], [70, 6, 5, 5], [1, 2, 0.5, 0.5], [9, 9, 9, 9]],
        "category": ["ball", "box", "box", "ball", "ball", "box"],
    }
    with caplog.at_level("INFO"):
        train, _, _ = load_detection(arguments([given]))
    # those at -5 and beyond the corner cut, those without area and outside left out, with their categories
    assert train.annotations[0].boxes.tolist() == [[0, 6, 15, 10], [50, 40, 14, 8], [1, 2, 0.5, 0.5], [9, 9, 9, 9]]
    assert train.annotations[0].categories.tolist() == [0, 1, 0, 1]
    assert "'train': 2 of 6 boxes were cut at the border of their images:" in caplog.text
    assert "'train': 2 of 6 boxes were left out:" in caplog.text
    for named in ("[-5.0, 6.0", "[4.0, 6.0, 0.0", "[50.0, 40.0", "[70.0, 6.0"):
        assert named in caplog.text
    assert "'test':" not in caplog.text  # a pixel beyond the edge is rounding
    assert "most boxes" in caplog.text


@pytest.mark.parametrize("canvas", [(48, 64), (96, 96), (40, 120)], ids=str)
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_stay_on_their_objects(canvas, flip):
    drawn = Image.new("RGB", (160, 120))
    box = (60, 40, 48, 36)
    drawn.paste((255, 255, 255), (60, 40, 108, 76))
    given = Objects(torch.tensor([box], dtype=torch.float32), torch.tensor([3]))
    sampler = CanvasSampler(canvas, 0.5, flip)
    scales = set()
    for seed in range(25):
        sample = sampler(drawn, given, random.Random(seed))
        height, width = sample["size"]
        scales.add(round(height / 120, 2))
        assert not sample["pixels"][:, height:].any()
        assert not sample["pixels"][:, :, width:].any()
        assert (height == canvas[0] or width == canvas[1]) or abs(width / height - 160 / 120) < 0.1
        rows, columns = (sample["pixels"][0] > 127).nonzero(as_tuple=True)
        if not len(sample["boxes"]):
            continue
        assert sample["class_labels"].tolist() == [3]
        centre_x, centre_y, box_width, box_height = (sample["boxes"][0] * torch.tensor([width, height] * 2)).tolist()
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        expected = (centre_x - box_width / 2, centre_y - box_height / 2)
        expected += (centre_x + box_width / 2, centre_y + box_height / 2)
        assert torch.tensor(found).tolist() == pytest.approx(expected, abs=1.01)
    assert len(scales) > 5 or canvas == (40, 120)


def test_what_a_crop_hardly_shows_is_no_object():
    given = Objects(torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0]))
    sampler = CanvasSampler((48, 64), 0.8, 0.0)
    shown = [len(sampler(image(0), given, random.Random(seed))["boxes"]) for seed in range(40)]
    assert 0 < sum(shown) < 40
    line = Objects(torch.tensor([[4.0, 4.0, 0.0, 4.0]]), torch.tensor([0]))
    assert not len(sampler(image(0), line, random.Random(0))["boxes"])


def test_training_sees_what_the_processor_makes():
    processor = DeformableDetrImageProcessor(
        size={"max_height": 96, "max_width": 96}, pad_size={"height": 96, "width": 96}
    )
    pictures = [image(0), image(1, (30, 70))]
    given = Objects(torch.tensor([[3.0, 6.0, 12.0, 24.0]]), torch.tensor([1]))
    sampler = CanvasSampler((96, 96), 0.0, 0.0)
    batch = collate([sampler(one, given, random.Random(0)) for one in pictures])
    found = model_inputs(processor, batch, torch.device("cpu"))
    expected = processor(pictures, return_tensors="pt")
    assert torch.equal(found["pixel_mask"], expected["pixel_mask"])
    assert (found["pixel_values"] - expected["pixel_values"]).abs().max() < 0.03  # a level or two of 255
    # as shares of the image, not of the canvas
    assert found["labels"][0]["boxes"][0].tolist() == pytest.approx([9 / 64, 18 / 48, 12 / 64, 24 / 48])


def test_a_corrupt_image_is_replaced(arguments):
    train, _, _ = load_detection(arguments([GOOD, GOOD, GOOD]))
    read = train.source.read_bytes
    source = train.source.__class__("broken", 3, lambda index: b"" if index == 1 else read(index), "")
    views = DetectionViews(
        train.__class__("train", source, train.annotations, "", []), CanvasSampler((48, 64), 0, 0), 0
    )
    first = views[0, 1]
    assert first["pixels"].any()
    assert torch.equal(first["pixels"], views[0, 1]["pixels"])
    broken = train.source.__class__("broken", 3, lambda index: b"", "")
    views = DetectionViews(
        train.__class__("train", broken, train.annotations, "", []), CanvasSampler((48, 64), 0, 0), 0
    )
    assert views[0, 1] is None
    assert collate([first, views[0, 1]]) is None
