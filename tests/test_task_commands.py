"""`hf-vicreg finetune detection|captioning` and `detect`: the examples of --help as written, and bad input."""

import json
import random
import re
import shlex
import shutil

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
    pipeline,
)

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.training.tasks.detection.model import find_boxes

COLOURS = {"ball": (230, 60, 40), "box": (40, 90, 230)}
SMALL = "--image_height 48 --image_width 64 --d_model 32 --encoder_layers 1 --decoder_layers 2 --num_queries 8"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a run, and images of two squares with their boxes and with captions, as image folders."""
    folder = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(0)
    config = BigBirdViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        tile_size=1,
    )
    BigBirdViTModel(config).save_pretrained(folder / "runs" / "mine")
    BigBirdViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "runs" / "mine")
    for split, count in (("train", 4), ("test", 2)):
        lines: dict[str, list[str]] = {"my_boxes": [], "my_captions": []}
        for number in range(count):
            rng = random.Random(f"{split}/{number}")
            image, boxes = Image.new("RGB", (64, 48), (200, 200, 190)), []
            names = [rng.choice(sorted(COLOURS)) for _ in range(2)]
            for place, name in enumerate(names):
                width, height = rng.randint(12, 20), rng.randint(12, 20)
                left, top = 32 * place + rng.randint(0, 31 - width), rng.randint(0, 47 - height)
                ImageDraw.Draw(image).rectangle((left, top, left + width - 1, top + height - 1), fill=COLOURS[name])
                boxes.append([left, top, width, height])
            said = {
                "my_boxes": {"objects": {"bbox": boxes, "category": names}},
                "my_captions": {"text": f"a {names[0]} and a {names[1]}"},
            }
            for data, fields in said.items():
                (folder / data / split).mkdir(parents=True, exist_ok=True)
                image.save(folder / data / split / f"{number}.png")
                lines[data].append(json.dumps({"file_name": f"{number}.png"} | fields))
        for data, rows in lines.items():
            (folder / data / split / "metadata.jsonl").write_text("\n".join(rows))
    image.save(folder / "my_photo.jpg")
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


@pytest.fixture(scope="module")
def detector(workplace):
    """A detector's folder, made by the example of --help, and what was printed."""
    import contextlib
    import io

    printed = io.StringIO()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(workplace)
        with contextlib.suppress(SystemExit):
            main(["finetune", "detection", "--help"])
        (line,) = re.findall(r"^example:\n\s+(hf-vicreg .*)$", printed.getvalue(), re.MULTILINE)
        assert main(shlex.split(line)[1:]) == 0
    torch.set_num_threads(threads)
    return workplace / "runs" / "detector", printed.getvalue()


def test_the_example_of_detection_runs_as_written(detector, workplace):
    folder, printed = detector
    record = record_of(folder)
    assert record["task"] == "finetune_detection"
    assert set(record["metrics"]) == {"map", "map_50", "map_75"}
    assert record["data"]["class_names"] == ["ball", "box"]
    assert (record["data"]["num_train"], record["data"]["num_train_objects"]) == (4, 8)
    assert (record["data"]["num_test"], record["data"]["test_images_in_train"]) == (2, 0)
    assert record["settings"]["image_height"] == 240
    assert record["details"]["steps"] == 2
    assert str(folder / "results.json").removeprefix(f"{workplace}/") in printed
    everything = "".join(path.read_text() for path in [*folder.glob("*.json"), *folder.glob("*.jsonl")])
    assert str(workplace) not in everything
    with Image.open(folder / record["pictures"][0]) as picture:
        assert picture.size == (128, 96)  # two images, annotated and found


def test_transformers_loads_the_detector(detector):
    folder, _ = detector
    model = AutoModelForObjectDetection.from_pretrained(folder)
    assert model.config.id2label == {0: "ball", 1: "box"}
    photo = Image.open("my_photo.jpg")
    found = pipeline("object-detection", str(folder), device="cpu")(photo, threshold=0.0)
    (ours,) = find_boxes(model, AutoImageProcessor.from_pretrained(folder), [photo], threshold=0.0)
    assert len(found) == 100
    theirs = sorted(found, key=lambda one: -one["score"])
    assert [one["label"] for one in theirs] == [model.config.id2label[label] for label in ours["labels"].tolist()]
    corners = torch.tensor([[one["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for one in theirs])
    assert (corners - ours["boxes"]).abs().max() <= 1  # theirs are whole numbers


def test_the_example_of_detect_runs_as_written(detector, workplace, capsys):
    arguments = example(capsys, "detect")
    assert main(arguments) == 0
    assert "my_photo.jpg: 0 objects" in capsys.readouterr().out  # two steps make no detector
    with Image.open(workplace / "detections" / "my_photo.png") as picture:
        assert picture.size == (64, 48)
    assert main(["detect", "runs/detector", "my_photo.jpg", "--threshold", "0", "--output", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "my_photo.jpg: 100 objects"
    assert re.fullmatch(r"  (ball|box) 0\.\d\d at -?\d+, -?\d+, size \d+x\d+", lines[1])
    scores = [float(line.split()[1]) for line in lines[1:101]]
    assert scores == sorted(scores, reverse=True)
    with Image.open("all/my_photo.png") as drawn, Image.open("detections/my_photo.png") as plain:
        assert drawn.tobytes() != plain.tobytes()


def test_a_resumed_detector_is_the_same(workplace):
    flags = f"finetune detection runs/mine --dataset_name my_boxes {SMALL} --batch_size 2 --max_steps 4"
    flags += " --checkpointing_steps 2 --logging_steps 1 --eval_steps 2"
    assert main([*flags.split(), "--output_dir", "whole"]) == 0
    shutil.copytree("whole", "resumed")
    shutil.rmtree("resumed/checkpoints/step_00000004")
    for name in ("model.safetensors", "results.json"):
        (workplace / "resumed" / name).unlink()
    again = [*flags.split(), "--output_dir", "resumed"]
    assert main(again) == 2  # not without being asked to
    assert main([*again, "--resume_from_checkpoint", "latest"]) == 0
    whole, resumed = workplace / "whole", workplace / "resumed"
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    steps = [
        [json.loads(line)["step"] for line in (one / "log.jsonl").read_text().splitlines()] for one in (whole, resumed)
    ]
    assert steps == [[1, 2, 2, 3, 4, 4]] * 2
    assert [step for step, _ in record_of(resumed)["details"]["map_50_curve"]] == [2, 4]


def test_a_detector_of_others_is_taken_and_one_without_its_processor_is_not(workplace, capsys):
    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[48, 64],
        patch_size=16,
        num_detection_tokens=5,
        num_labels=2,
    )
    YolosForObjectDetection(config).save_pretrained("yolos")
    assert main(["detect", "yolos", "my_photo.jpg"]) == 2
    assert "`MODEL`: expected a detector's image processor in yolos" in capsys.readouterr().err
    YolosImageProcessor(size={"height": 48, "width": 64}).save_pretrained("yolos")
    assert main(["detect", "yolos", "my_photo.jpg", "--threshold", "0"]) == 0
    assert "my_photo.jpg: 5 objects" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_the_same_detector(workplace, ranks):
    flags = f"finetune detection {workplace}/runs/mine --dataset_name {workplace}/my_boxes {SMALL} --max_steps 3"
    flags += f" --batch_size 4 --max_grad_norm 0 --output_dir {workplace}"
    assert main(f"{flags}/one".split()) == 0
    finished = ranks(2, "-m", "hf_vicreg.cli", *f"{flags}/two".split())
    assert finished.returncode == 0, finished.stderr
    assert record_of(workplace / "two")["details"]["processes"] == 2
    one, two = (load_file(workplace / name / "model.safetensors") for name in ("one", "two"))
    difference = sum((one[key] - two[key]).double().square().sum() for key in one).sqrt()
    assert difference < 1e-5 * sum(tensor.double().square().sum() for tensor in one.values()).sqrt()


@pytest.mark.slow
def test_a_detector_learns_its_images(workplace):
    flags = f"finetune detection runs/mine --dataset_name my_boxes {SMALL} --max_steps 300 --learning_rate 2e-3"
    flags += " --test_split train --encoder_learning_rate_ratio 1 --output_dir learned"
    assert main(flags.split()) == 0
    record = record_of(workplace / "learned")
    assert record["data"]["test_images_in_train"] == 4
    assert record["metrics"]["map_50"] > 0.6  # 0.81; boxes in the wrong place give 0


def test_the_example_of_captioning_runs_as_written(workplace, capsys):
    arguments = example(capsys, "finetune", "captioning")
    assert main(arguments) == 0
    folder = workplace / "runs" / "captioner"
    record = record_of(folder)
    assert record["task"] == "finetune_captioning"
    assert set(record["metrics"]) == {"exact_match", "loss"}
    assert len(record["details"]["samples"]) == 2
    assert str(workplace) not in "".join(path.read_text() for path in folder.glob("*.json"))
    # what is printed as the way to use it, used
    snippet = capsys.readouterr().out.split("To use the captioner:\n\n")[1]
    names = {"images": [Image.open(f"my_captions/test/{number}.png") for number in range(2)]}
    exec(snippet, names)
    written = [" ".join(text.split()) for text in names["captions"]]
    assert written == [sample["written"] for sample in record["details"]["samples"]]


def test_a_resumed_captioner_is_the_same(workplace):
    flags = "finetune captioning runs/mine --dataset_name my_captions --decoder_hidden_size 32 --decoder_layers 1"
    flags += " --batch_size 2 --max_steps 4 --checkpointing_steps 2"
    assert main([*flags.split(), "--output_dir", "said"]) == 0
    shutil.copytree("said", "said_again")
    shutil.rmtree("said_again/checkpoints/step_00000004")
    (workplace / "said_again" / "model.safetensors").unlink()
    torch.manual_seed(5)  # the decoder drops activations: its generator's state has to come back
    assert main([*flags.split(), "--output_dir", "said_again", "--resume_from_checkpoint", "latest"]) == 0
    one, other = (workplace / name / "model.safetensors" for name in ("said", "said_again"))
    assert one.read_bytes() == other.read_bytes()


def test_what_is_frozen_is_not_in_training_mode(workplace):
    seen = []

    def look(module, inputs):
        if type(module).__name__ == "BigBirdViTBackbone":
            seen.append((module.training, torch.is_grad_enabled()))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    flags = f"finetune detection runs/mine --dataset_name my_boxes {SMALL} --batch_size 2 --max_steps 2"
    try:
        for ratio in ("0", "1"):
            arguments = [*flags.split(), "--encoder_learning_rate_ratio", ratio, "--output_dir", f"frozen_{ratio}"]
            assert main(arguments) == 0
            trained = {mode for mode, learning in seen if learning}
            assert trained == {ratio == "1"}
            seen.clear()
    finally:
        hook.remove()


DETECTION = ["finetune", "detection", "runs/mine", "--output_dir", "o", "--dataset_name"]
CAPTIONING = ["finetune", "captioning", "runs/mine", "--output_dir", "o", "--dataset_name"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*DETECTION, "my_captions"], "`objects_column_name`: expected a column 'objects' in split 'train'"),
        ([*DETECTION, "no/such/folder"], "`dataset_name`: expected a Hub id or an existing folder"),
        (DETECTION[:-1], "`dataset_name`: expected annotated images, got none"),
        ([*DETECTION, "my_boxes", "--decoder_layers", "1"], "`decoder_layers`: expected at least 2 of a detector"),
        ([*DETECTION, "my_boxes", "--d_model", "40"], "`d_model`: expected a multiple of 32, got 40"),
        ([*DETECTION, "my_boxes", "--scale_jitter", "1"], "`scale_jitter`: expected a number from 0 to below 0.9"),
        ([*DETECTION, "my_boxes", "--num_queries", "1"], "`num_queries`: expected at least the 2 objects"),
        (
            ["finetune", "detection", "nowhere", "--output_dir", "o", "--dataset_name", "my_boxes"],
            "`MODEL`: expected the folder or Hub id",
        ),
        (
            ["finetune", "detection", "runs/mine", "--dataset_name", "my_boxes"],
            "`output_dir`: expected a folder for the model, got none",
        ),
        (
            ["finetune", "detection", "runs/mine", "--dataset_name", "my_boxes", "--output_dir", "runs/mine"],
            "`output_dir`: expected a new or empty folder",
        ),
        ([*CAPTIONING, "my_boxes"], "`text_column_name`: expected a column 'text' in split 'train'"),
        ([*CAPTIONING, "my_captions", "--vocab_size", "10"], "`vocab_size`: expected a number of at least 260"),
        ([*CAPTIONING, "my_captions", "--max_target_length", "1"], "`max_target_length`: expected a number of at lea"),
        ([*DETECTION, "my_boxes", "--encoder_layers", "0"], "`encoder_layers`: expected a number of at least 1"),
        (["detect", "runs/mine", "my_photo.jpg"], "`MODEL`: expected the folder or Hub id of a detector"),
        (["detect", "nowhere", "my_photo.jpg"], "`MODEL`: expected the folder or Hub id"),
        (["detect", "runs/mine", "no_photo.jpg"], "`IMAGE`: expected image files, cannot read no_photo.jpg"),
        (
            ["detect", "runs/mine", "my_photo.jpg", "my_boxes/../my_photo.jpg", "--output", "o"],
            "`IMAGE`: expected names that differ, found several of 'my_photo'",
        ),
    ],
    ids=[
        "no-objects", "no-folder", "no-data", "one-layer", "width", "jitter", "queries", "no-model", "no-output",
        "not-empty", "no-text", "vocabulary", "length", "layers", "no-detector", "no-model-to-detect", "no-image",
        "same-names",
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(arguments, message, workplace, capsys):
    assert main(arguments) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert message in line
    assert not (workplace / "o").exists()
