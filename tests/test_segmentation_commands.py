"""`hf-vicreg finetune segmentation` and `segment`: the examples of --help as written, and bad input."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.training.tasks.segmentation.measures import confusion
from hf_vicreg.training.tasks.segmentation.model import find_classes

SMALL = "--image_height 32 --image_width 32 --decoder_hidden_size 32 --batch_size 2"
FINETUNE = f"finetune segmentation runs/mine {SMALL} --dataset_name"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a run, images of two squares with semantic masks in `my_masks`, numbered ones in `my_objects`."""
    folder = tmp_path_factory.mktemp("segmentation")
    torch.manual_seed(0)
    config = BigBirdViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=4,
        tile_size=1,
    )  # fmt: skip
    BigBirdViTModel(config).save_pretrained(folder / "runs" / "mine")
    BigBirdViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "runs" / "mine")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        rows = []
        for number in range(count):
            pixels, objects = rng.integers(150, 190, (40, 52, 3), dtype=np.uint8), np.zeros((40, 52), np.uint16)
            for one in range(2):
                top, left = rng.integers(2, 20), 26 * one + rng.integers(1, 9)
                pixels[top : top + 15, left : left + 14] = (40, 60, 90)
                objects[top : top + 15, left : left + 14] = 300 * one + 5
            rows.append(json.dumps({"file_name": f"{number}.png", "mask_file_name": f"masks/{number}.png"}))
            for data, mask in (("my_masks", (objects > 0).astype(np.uint8)), ("my_objects", objects)):
                (folder / data / split / "masks").mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / data / split / f"{number}.png")
                Image.fromarray(mask).save(folder / data / split / "masks" / f"{number}.png")
        for data in ("my_masks", "my_objects"):
            (folder / data / split / "metadata.jsonl").write_text("\n".join(rows))
    Image.fromarray(np.tile(pixels, (3, 2, 1))).save(folder / "my_photo.jpg")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(autouse=True)
def _at_work(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def example(capsys, *verb):
    with pytest.raises(SystemExit) as caught:
        main([*verb, "--help"])
    assert caught.value.code == 0
    (line,) = re.findall(r"^example:\n\s+(hf-vicreg .*)$", capsys.readouterr().out, re.MULTILINE)
    return shlex.split(line)[1:]


def record_of(folder):
    (record,) = json.loads((folder / "results.json").read_text())["evaluations"]
    return record


def test_the_examples_of_segmentation_run_as_written(workplace, capsys):
    assert main(example(capsys, "finetune", "segmentation")) == 0
    folder, printed = workplace / "runs" / "segmenter", capsys.readouterr().out
    record = record_of(folder)
    assert record["task"] == "finetune_segmentation"
    assert set(record["metrics"]) == {"mean_iou", "dice"}
    assert record["data"]["class_names"] == ["0", "1"]
    assert (record["data"]["num_train"], record["data"]["num_test"], record["details"]["steps"]) == (4, 2, 2)
    assert np.sum(record["details"]["confusion"]) == 2 * 40 * 52
    assert "runs/segmenter/results.json" in printed
    assert str(workplace) not in "".join(
        path.read_text() for path in [*folder.glob("*.json"), *folder.glob("*.jsonl")]
    )
    with Image.open(folder / record["pictures"][0]) as picture:
        assert picture.size == (3 * 52, 2 * 40)

    assert main(example(capsys, "segment")) == 0
    assert re.search(r"my_photo.jpg: 0 \d+\.\d%, 1 \d+\.\d%", capsys.readouterr().out)
    names = {}
    exec(printed[printed.index("import hf_vicreg") :], names)  # what is printed as the way to load it
    photo = Image.open("my_photo.jpg")
    expected = find_classes(names["model"], names["processor"], photo)
    with Image.open("segments/my_photo_mask.png") as mask, Image.open("segments/my_photo_overlay.png") as overlay:
        assert mask.mode == "L"
        assert np.array_equal(np.asarray(mask), expected)
        assert overlay.size == photo.size == (104, 120)
    # what was measured before it was saved
    counts = np.zeros((2, 2), int)
    for number in range(2):
        with (
            Image.open(f"my_masks/test/{number}.png") as image,
            Image.open(f"my_masks/test/masks/{number}.png") as mask,
        ):
            found = find_classes(names["model"], names["processor"], image.convert("RGB")).numpy()
            counts += confusion(np.asarray(mask), found, 2)
    # threads may have been others, and pixels that are a tie fall otherwise
    assert np.abs(counts - record["details"]["confusion"]).sum() <= 0.01 * counts.sum()
    # a window's own logits, as anybody gets them from transformers
    window = photo.crop((0, 0, 64, 64))
    inputs = names["processor"](window, return_tensors="pt")
    with torch.no_grad():
        theirs = names["model"].eval()(**inputs).logits[0]
    ours = find_classes(names["model"], names["processor"], window)
    top_two = theirs.topk(2, dim=0).values
    sure = top_two[0] - top_two[1] > 1e-3  # pixel arithmetic of the processor is rounded otherwise
    assert sure.float().mean() > 0.9
    assert (theirs.argmax(0) == ours)[sure].all()


def test_objects_are_found_again(workplace, capsys):
    flags = f"{FINETUNE} my_objects --instances --quarter_turns --max_steps 2 --output_dir objects"
    assert main(flags.split()) == 0
    record = record_of(workplace / "objects")
    assert set(record["metrics"]) == {"mean_iou", "dice", "ap_50"}
    assert record["details"]["objects"]["found"] + record["details"]["objects"]["missed"] == 4
    assert main(["segment", "objects", "my_objects/test", "--output", "o1"]) == 2  # masks lie below with equal names
    assert "expected names that differ, found several of '0'" in capsys.readouterr().err
    assert main(["segment", "objects", "my_photo.jpg", "--output", "o1"]) == 0
    with Image.open("o1/my_photo_objects.png") as objects:
        assert re.search(rf"my_photo.jpg: {np.asarray(objects).max()} objects;", capsys.readouterr().out)


def test_a_resumed_segmenter_is_the_same(workplace):
    flags = f"{FINETUNE} my_masks --max_steps 4 --checkpointing_steps 2 --eval_steps 2 --logging_steps 1 --output_dir"
    assert main([*flags.split(), "whole"]) == 0
    shutil.copytree("whole", "resumed")
    shutil.rmtree("resumed/checkpoints/step_00000004")
    for name in ("model.safetensors", "results.json"):
        (workplace / "resumed" / name).unlink()
    assert main([*flags.split(), "resumed", "--resume_from_checkpoint", "latest"]) == 0
    one, other = (workplace / name / "model.safetensors" for name in ("whole", "resumed"))
    assert one.read_bytes() == other.read_bytes()
    assert load_file(one)["backbone.layernorm.weight"].shape == (32,)


def test_adapters_are_merged_into_the_segmenter(workplace):
    assert main([*f"{FINETUNE} my_masks --max_steps 2 --lora_rank 2 --output_dir thin".split()]) == 0
    model = AutoModelForSemanticSegmentation.from_pretrained(workplace / "thin")
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert AutoImageProcessor.from_pretrained(workplace / "thin").size == {"height": 32, "width": 32}


@pytest.mark.slow
def test_a_segmenter_learns_its_images(workplace):
    flags = f"{FINETUNE} my_objects --instances --max_steps 200 --learning_rate 2e-3 --test_split train"
    assert main([*flags.split(), "--output_dir", "learned", "--encoder_learning_rate_ratio", "1"]) == 0
    metrics = record_of(workplace / "learned")["metrics"]
    assert metrics["dice"] > 0.9
    assert metrics["ap_50"] > 0.8


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_a_segmenter(workplace, ranks):
    flags = f"finetune segmentation {workplace}/runs/mine {SMALL} --dataset_name {workplace}/my_masks --max_steps 2"
    finished = ranks(2, "-m", "hf_vicreg.cli", *flags.split(), "--output_dir", f"{workplace}/two")
    assert finished.returncode == 0, finished.stderr
    record = record_of(workplace / "two")
    assert record["details"]["processes"] == 2
    assert np.sum(record["details"]["confusion"]) == 2 * 40 * 52


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            f"{FINETUNE} my_masks --mask_column_name cells",
            "`mask_column_name`: expected a column 'cells' in split 'train'",
        ),
        (f"{FINETUNE} my_objects", "`class_names`: expected masks of the 255 classes 0 to 254"),
        (f"{FINETUNE} my_masks --scale_jitter 1", "`scale_jitter`: expected a number from 0 to below 0.9"),
        (f"{FINETUNE} my_masks --decoder_hidden_size 40", "`decoder_hidden_size`: expected a multiple of 32, got 40"),
        ("segment runs/mine my_photo.jpg --output", "`MODEL`: expected the folder or Hub id of a segmenter"),
        ("segment runs/mine no_photo.jpg --output", "`IMAGE`: expected image files, cannot read no_photo.jpg"),
        ("segment runs/mine empty --output", "`IMAGE`: expected image files below empty, found none"),
    ],
    ids=["column", "numbers", "jitter", "width", "no-segmenter", "no-image", "no-images"],
)
def test_bad_input_gets_one_line(command, message, workplace, capsys):
    place = [] if command.endswith("--output") else ["--output_dir"]
    assert main([*command.split(), *place, "nothing"]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert message in line
    assert not (workplace / "nothing").exists()
