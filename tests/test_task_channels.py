"""Tasks on images of other channels and depths than 8-bit RGB: trained, evaluated, written, loaded again."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
    AutoTokenizer,
    VisionEncoderDecoderModel,
)

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel, embed, pretrain
from hf_vicreg.cli import main
from hf_vicreg.training.evaluation.encoder import source_for
from hf_vicreg.training.image_text.search import search
from hf_vicreg.training.images.channels.raster import Raster, resized
from hf_vicreg.training.tasks.arguments import DetectionArguments
from hf_vicreg.training.tasks.detection.command import collate, model_inputs
from hf_vicreg.training.tasks.detection.data import CanvasSampler, DetectionViews, load_detection
from hf_vicreg.training.tasks.detection.model import build_detector_processor
from hf_vicreg.training.tasks.segmentation.model import find_classes

SMALL = ["--image_height", "32", "--image_width", "32", "--decoder_hidden_size", "32", "--batch_size", "2"]
LOW, HIGH = 100.0, 4000.0


def save(path, pixels):
    if pixels.shape[2] == 1:
        Image.fromarray(pixels[:, :, 0]).save(path)
    else:
        tifffile.imwrite(path, pixels.transpose(2, 0, 1), photometric="minisblack")


@pytest.fixture(params=[(5, "tif", np.uint16)], ids=["5x16"])
def channels(request, tmp_path, monkeypatch):
    """The number of channels; in the folder an encoder of them and images of bright squares with masks."""
    count, suffix, dtype = request.param
    torch.manual_seed(0)
    config = BigBirdViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=4,
        tile_size=1, num_channels=count,
    )  # fmt: skip
    BigBirdViTModel(config).save_pretrained(tmp_path / "run")
    BigBirdViTImageProcessor(
        size={"height": 32, "width": 32},
        channel_low=[LOW] * count,
        channel_high=[HIGH] * count,
        image_mean=[0.3] * count,
        image_std=[0.2] * count,
        do_rescale=False,
    ).save_pretrained(tmp_path / "run")
    rng = np.random.default_rng(0)
    for split, images in (("train", 4), ("test", 2)):
        (tmp_path / "data" / split / "masks").mkdir(parents=True)
        rows = []
        for number in range(images):
            pixels, mask = rng.integers(200, 600, (40, 52, count)), np.zeros((40, 52), np.uint8)
            top, left = rng.integers(2, 20), rng.integers(2, 30)
            pixels[top : top + 15, left : left + 14] += 3000
            mask[top : top + 15, left : left + 14] = 1
            save(tmp_path / "data" / split / f"{number}.{suffix}", pixels.astype(dtype))
            Image.fromarray(mask).save(tmp_path / "data" / split / "masks" / f"{number}.png")
            said = {"text": ["left", "right"][number % 2], "brightness": float(number), "kind": ["a", "b"][number % 2]}
            said |= {"objects": {"bbox": [[int(left), int(top), 14, 15]], "category": ["square"]}}
            rows.append({"file_name": f"{number}.{suffix}", "mask_file_name": f"masks/{number}.png"} | said)
        (tmp_path / "data" / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return count, suffix


@pytest.mark.parametrize(
    ("channels", "more"),
    [
        ((1, "png", np.uint16), []),
        ((5, "tif", np.uint16), ["--quarter_turns"]),
        ((2, "tif", np.float32), []),
    ],
    indirect=["channels"],
    ids=["1x16", "5x16", "2x32"],
)
def test_a_segmenter_of_any_channels_trains_and_finds_the_same_when_loaded(channels, more, tmp_path, capsys):
    count, suffix = channels
    data = ["--dataset_name", "data", "--max_steps", "3", "--output_dir", "out"]
    assert main(["finetune", "segmentation", "run", *SMALL, *data, *more]) == 0
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())["evaluations"]
    assert record["details"]["unreadable_test_images"] == 0
    assert np.sum(record["details"]["confusion"]) == 2 * 40 * 52
    with Image.open(tmp_path / "out" / "segments.png") as picture:
        assert picture.size == (3 * 52, 2 * 40)
        assert np.ptp(np.asarray(picture)[:40, :52]) > 200  # stretched over the range of the channels
    processor = AutoImageProcessor.from_pretrained("out")
    model = AutoModelForSemanticSegmentation.from_pretrained("out").eval()
    assert list(processor.channel_low) == [LOW] * count
    file = tmp_path / "data" / "test" / f"0.{suffix}"
    assert main(["segment", "out", str(file), "--output", "found"]) == 0
    with (
        Image.open(tmp_path / "found" / "0_mask.png") as mask,
        Image.open(tmp_path / "found" / "0_overlay.png") as over,
    ):
        found = np.asarray(mask)
        assert over.size == (52, 40)
    values = tifffile.imread(file) if suffix == "tif" else np.asarray(Image.open(file))[None]
    raster = Raster.of(np.ascontiguousarray(values.transpose(1, 2, 0)))
    assert np.array_equal(find_classes(model, processor, raster), found)
    # one window by the formula: values as shares of the range, then mean and deviation
    window = ((values[:, :32, :32].astype(np.float64) - LOW) / (HIGH - LOW)).clip(0, 1)
    pixels = torch.from_numpy((window - 0.3) / 0.2).float()[None]
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(model(pixels).logits, (32, 32), mode="bilinear")[0]
    ours = find_classes(model, processor, Raster.of(np.ascontiguousarray(values[:, :32, :32].transpose(1, 2, 0))))
    sure = (logits[0] - logits[1]).abs() > 1e-4
    assert (logits.argmax(0) == ours)[sure].all()
    theirs = processor(str(file), return_tensors="pt", do_resize=False)["pixel_values"][0]
    torch.testing.assert_close(theirs[:, :32, :32], pixels[0], atol=1e-6, rtol=0)
    # a folder, and a form that pictures do not have
    (tmp_path / "more").mkdir()
    np.save(tmp_path / "more" / "as_array.npy", values)
    assert main(["segment", "out", "more", "--output", "of_folder"]) == 0
    with Image.open(tmp_path / "of_folder" / "as_array_mask.png") as mask:
        assert np.array_equal(np.asarray(mask), found)
    capsys.readouterr()


def test_tokens_of_any_channels_are_measured_by_masks(channels, tmp_path, capsys):
    flags = ["--dataset_name", "data", "--image_height", "32", "--image_width", "32", "--bank_size", "200"]
    assert main(["evaluate", "dense", "run", *flags]) == 0
    metrics = json.loads((tmp_path / "run-evaluation" / "results.json").read_text())["evaluations"][0]["metrics"]
    assert metrics["pixels_knn_mean_iou"] > 0.5  # the squares are bright
    capsys.readouterr()


def test_captions_numbers_masks_and_boxes_on_one_encoder_of_any_channels(channels, tmp_path, capsys):
    count, suffix = channels
    captions = {"decoder_hidden_size": 32, "decoder_layers": 1, "vocab_size": 260, "max_target_length": 4}
    boxes = {"num_queries": 6, "d_model": 32, "encoder_layers": 1, "image_height": 24, "image_width": 32}
    masks = {"decoder_hidden_size": 32, "image_height": 32, "image_width": 32}
    tasks = [
        {"name": "says", "kind": "captioning"} | captions,
        {"name": "light", "kind": "regression", "label_column_name": "brightness"},
        {"name": "kinds", "kind": "classification", "label_column_name": "kind"},
        {"name": "masks", "kind": "segmentation"} | masks,
        {"name": "boxes", "kind": "detection"} | boxes,
    ]
    told = {"model": "run", "tasks": [one | {"dataset_name": "data", "image_column_name": "image"} for one in tasks]}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(told))
    flags = ["--output_dir", "several", "--batch_size", "8", "--max_steps", "2"]
    assert main(["finetune", "multitask", "tasks.yaml", *flags]) == 0
    file = str(tmp_path / "data" / "test" / f"0.{suffix}")
    processor = AutoImageProcessor.from_pretrained("several/heads/says")
    pixels = processor(file, return_tensors="pt")["pixel_values"]
    assert pixels.shape[1] == count
    assert VisionEncoderDecoderModel.from_pretrained("several/heads/says").generate(pixels).shape[0] == 1
    light = AutoModelForImageClassification.from_pretrained("several/heads/light")
    assert light(pixels).logits.isfinite().all()
    assert main(["detect", "several/heads/boxes", file, "--threshold", "0"]) == 0
    assert " objects" in capsys.readouterr().out

    flags = ["--dataset_name", "data", "--image_column_name", "image", "--output_dir", "captioner", "--max_steps", "2"]
    assert main(["finetune", "captioning", "run", *flags, "--decoder_hidden_size", "32", "--decoder_layers", "1"]) == 0
    (record,) = json.loads((tmp_path / "captioner" / "results.json").read_text())["evaluations"]
    assert record["details"]["unreadable_test_images"] == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    "channels", [(1, "png", np.uint16), (5, "tif", np.uint16)], indirect=True, ids=["1x16", "5x16"]
)
def test_a_captioner_of_any_channels_writes_of_a_file_when_loaded(channels, tmp_path, capsys):
    count, suffix = channels
    data = ["--dataset_name", "data", "--image_column_name", "image", "--output_dir", "out", "--max_steps", "3"]
    small = ["--decoder_hidden_size", "32", "--decoder_layers", "1", "--max_target_length", "5", "--batch_size", "2"]
    assert main(["finetune", "captioning", "run", *small, *data]) == 0
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())["evaluations"]
    assert record["details"]["unreadable_test_images"] == 0
    model = VisionEncoderDecoderModel.from_pretrained("out").eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    files = [str(tmp_path / "data" / "test" / f"{number}.{suffix}") for number in (0, 1)]
    pixels = processor(files, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, count, 32, 32)
    written = tokenizer.batch_decode(model.generate(pixels, do_sample=False), skip_special_tokens=True)
    assert [one["written"] for one in record["details"]["samples"]] == [" ".join(one.split()) for one in written]
    # the loss of the given captions, from values by the formula
    losses = []
    for file, text in zip(files, ("left", "right"), strict=True):
        values = tifffile.imread(file) if suffix == "tif" else np.asarray(Image.open(file))[None]
        share = torch.from_numpy(((values - LOW) / (HIGH - LOW)).clip(0, 1)).float()[None]
        given = (torch.nn.functional.interpolate(share, (32, 32), mode="bicubic", antialias=True) - 0.3) / 0.2
        labels = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"][:4], tokenizer.eos_token_id]])
        with torch.no_grad():
            losses.append(model(pixel_values=given, labels=labels).loss.item())
    assert record["metrics"]["loss"] == pytest.approx(np.mean(losses), abs=2e-3)
    capsys.readouterr()


@pytest.mark.parametrize(
    "channels", [(1, "png", np.uint16), (5, "tif", np.uint16)], indirect=True, ids=["1x16", "5x16"]
)
def test_images_of_any_channels_are_pretrained_with_captions_and_searched_by_words(channels, tmp_path, capsys):
    count, suffix = channels
    texts = {"model_type": "distilbert", "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "vocab_size": 300}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    run = pretrain(
        out="pair",
        data="data",
        image_column_name="image",
        caption_column=["text"],
        second_model=texts,
        model=shape | {"image_size": 16, "patch_size": 8, "num_channels": count},
        vicreg={"expander_sizes": [16, 16]},
        batch_size=2,
        max_steps=3,
        device="cpu",
    )
    assert "image_text" in run.results
    model, processor = AutoModel.from_pretrained("pair").eval(), AutoProcessor.from_pretrained("pair")
    files = [str(tmp_path / "data" / "test" / f"{number}.{suffix}") for number in (0, 1)]
    inputs = processor(text=["left", "right"], images=files, return_tensors="pt", padding=True)
    assert inputs["pixel_values"].shape == (2, count, 16, 16)
    with torch.no_grad():
        outputs = model(**inputs)
        cosines = torch.nn.functional.cosine_similarity(outputs.text_embeds[:1], outputs.image_embeds)
    (tmp_path / "files").mkdir()
    for file in files:
        shutil.copy(file, tmp_path / "files")
    embed("files", "pair", "features", device="cpu")
    found = search("pair", "features", "left")
    assert {one.place: round(one.cosine, 4) for one in found} == {
        f"{number}.{suffix}": round(cosine, 4) for number, cosine in enumerate(cosines.tolist())
    }
    capsys.readouterr()


BOXES = [
    "--num_queries",
    "6",
    "--d_model",
    "32",
    "--encoder_layers",
    "1",
    "--decoder_layers",
    "2",
    "--batch_size",
    "2",
]


def shares(values):
    """Normalised by the formula, of values `(channels, height, width)`."""
    return ((((values.astype(np.float64) - LOW) / (HIGH - LOW)).clip(0, 1) - 0.3) / 0.2).astype(np.float32)


@pytest.mark.parametrize(
    "channels",
    [(1, "png", np.uint16), (5, "tif", np.uint16), (2, "tif", np.float32)],
    indirect=True,
    ids=["1x16", "5x16", "2x32"],
)
def test_a_detector_of_any_channels_trains_and_finds_the_same_when_loaded(channels, tmp_path, capsys):
    count, suffix = channels
    data = ["--dataset_name", "data", "--image_column_name", "image", "--max_steps", "3", "--output_dir", "out"]
    # as large as the images but for four columns: nothing is resized, something is padded
    canvas = ["--image_height", "40", "--image_width", "56"]
    assert main(["finetune", "detection", "run", *BOXES, *canvas, *data]) == 0
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())["evaluations"]
    assert record["details"]["unreadable_test_images"] == 0
    assert "pipeline" not in capsys.readouterr().out  # which opens images as RGB
    with Image.open(tmp_path / "out" / "detections.png") as picture:
        assert picture.size == (2 * 52, 2 * 40)
        assert np.ptp(np.asarray(picture)[:40, :52]) > 200  # stretched over the range of the channels
    detector = AutoModelForObjectDetection.from_pretrained("out").eval()
    processor = AutoImageProcessor.from_pretrained("out")
    file = tmp_path / "data" / "test" / f"0.{suffix}"
    values = tifffile.imread(file) if suffix == "tif" else np.asarray(Image.open(file))[None]
    inputs = processor(str(file), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, count, 40, 56)
    np.testing.assert_allclose(inputs["pixel_values"][0, :, :, :52], shares(values), atol=1e-6)
    assert not inputs["pixel_values"][..., 52:].any()
    assert torch.equal(inputs["pixel_mask"][0, :, :52], torch.ones(40, 52, dtype=torch.int64))
    assert not inputs["pixel_mask"][..., 52:].any()
    assert main(["detect", "out", str(file), "--output", "found", "--threshold", "0"]) == 0
    printed = capsys.readouterr().out
    with Image.open(tmp_path / "found" / "0.png") as picture:
        assert picture.size == (52, 40)
    with torch.no_grad():
        outputs = detector(**inputs)
    (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(40, 52)])
    assert f"0.{suffix}: {len(found['boxes'])} objects" in printed
    for score, (left, top, *_) in zip(found["scores"].tolist(), found["boxes"].tolist(), strict=True):
        assert f" {score:.2f} at {left:.0f}, {top:.0f}, size " in printed
    # a picture of other channels
    Image.new("RGB", (52, 40)).save(tmp_path / "photo.png")
    assert main(["detect", "out", "photo.png", "--output", "not"]) == 2
    assert f"3 channel(s) where {count} are wanted" in capsys.readouterr().err
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("canvas", [(24, 32), (64, 96)])
def test_a_detector_sees_in_use_what_it_sees_in_training(channels, canvas, tmp_path):
    count, suffix = channels
    config = BigBirdViTConfig.from_pretrained("run")
    build_detector_processor("run", config, *canvas).save_pretrained("detector")
    arguments = DetectionArguments(dataset_name="data", image_column_name="image")
    reader = AutoImageProcessor.from_pretrained("run")
    train, _, names = load_detection(arguments, partial(source_for, reader))
    assert names == ["square"]
    views = DetectionViews(train, CanvasSampler(canvas, 0.0, 0.0), seed=0)
    processor = AutoImageProcessor.from_pretrained("detector")
    seen = model_inputs(processor, collate([views[0, 0], views[0, 1]]), torch.device("cpu"))
    files = [str(tmp_path / "data" / "train" / f"{number}.{suffix}") for number in (0, 1)]
    for backend in ("torchvision", "pil"):
        used = AutoImageProcessor.from_pretrained("detector", backend=backend)(files, return_tensors="pt")
        assert used["pixel_values"].shape == (2, count, *canvas)
        assert torch.equal(used["pixel_mask"], seen["pixel_mask"])
        torch.testing.assert_close(used["pixel_values"], seen["pixel_values"], atol=2e-3, rtol=0)
    # the box of the bright square, in shares of what is shown
    height, width = int(seen["pixel_mask"][0].any(1).sum()), int(seen["pixel_mask"][0].any(0).sum())
    x, y, wide, high = (seen["labels"][0]["boxes"][0] * torch.tensor([width, height] * 2)).tolist()
    shown = seen["pixel_values"][0].mean(0)
    inside = shown[round(y - high / 3) : round(y + high / 3), round(x - wide / 3) : round(x + wide / 3)]
    assert inside.min() > shown[:height, :width].mean() + 1


def test_the_processor_of_an_encoder_is_none_of_a_detector(channels, tmp_path, capsys):
    data = ["--dataset_name", "data", "--image_column_name", "image", "--max_steps", "1", "--output_dir", "out"]
    canvas = ["--image_height", "24", "--image_width", "32"]
    assert main(["finetune", "detection", "run", *BOXES, *canvas, *data]) == 0
    AutoImageProcessor.from_pretrained("run").save_pretrained("out")
    capsys.readouterr()
    assert main(["detect", "out", str(tmp_path / "data" / "test" / "0.tif")]) == 2
    assert "`MODEL`: expected a detector's image processor in out" in capsys.readouterr().err


def test_an_image_processor_of_other_channels_gets_one_line(channels, tmp_path, capsys):
    (tmp_path / "run" / "preprocessor_config.json").unlink()
    flags = ["--dataset_name", "data", "--max_steps", "3", "--output_dir", "out"]
    assert main(["finetune", "segmentation", "run", *SMALL, *flags]) == 2
    assert "`MODEL`: expected an image processor of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("box", [None, (3.25, 1.5, 17.0, 20.75)])
def test_channels_are_resized_as_pillow_resizes_each(box):
    pixels = np.random.default_rng(0).integers(0, 60000, (24, 20, 5)).astype(np.uint16)
    found = resized(pixels, (13, 9), box)
    assert found.dtype == np.float32
    for channel in range(5):
        plane = Image.fromarray(pixels[:, :, channel].astype(np.float32))
        own = np.asarray(plane.resize((13, 9), Image.Resampling.BILINEAR, box=box))
        assert np.array_equal(found[:, :, channel], own)
    photo = pixels[:, :, :3].astype(np.uint8)
    picture = np.asarray(Image.fromarray(photo).resize((13, 9), Image.Resampling.BILINEAR, box=box))
    assert np.array_equal(resized(photo, (13, 9), box), picture)
    assert np.abs(resized(photo[:, :, :2], (13, 9), box).astype(int) - picture[:, :, :2]).max() <= 1
