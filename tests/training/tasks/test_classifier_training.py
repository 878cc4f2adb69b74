"""Fine-tuning: what learns how fast, what comes out, and that an interrupted run ends like an undisturbed one."""

import json
import os
import shutil
import signal
import sys
import threading
import time

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    BitImageProcessor,
    ConvNextImageProcessor,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from hf_vicreg import BigBirdViTConfig, BigBirdViTForImageClassification, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.training.engine.optim import decayed_groups, layer_depths
from hf_vicreg.training.engine.unseen import unseen_parameters
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import FinetuneArguments
from hf_vicreg.training.tasks.classification.command import finetune_classification
from hf_vicreg.training.tasks.classification.data import image_size_of, pixel_values

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "tile_size": 1,
    "initializer_range": 0.06,
}
COLOURS = [(190, 40, 40), (40, 170, 60), (50, 60, 190), (180, 180, 50)]


@pytest.fixture
def encoder(tmp_path):
    """Returns a function that saves an encoder with its processor and returns the folder."""

    def save(**changes):
        torch.manual_seed(3)
        BigBirdViTModel(BigBirdViTConfig(**TINY | changes)).save_pretrained(tmp_path / "encoder")
        BigBirdViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "encoder")
        return str(tmp_path / "encoder")

    return save


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Flags that name 60 training and 20 test images of noise around one of four colours."""
    folder = tmp_path_factory.mktemp("colours")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 60), ("test", 20)):
        labels = [index % 4 for index in range(count)]
        noise = torch.randint(-40, 40, (count, 34, 34, 3), generator=generator)
        pixels = (torch.tensor(COLOURS)[labels][:, None, None] + noise).clamp(0, 255).to(torch.uint8).numpy()
        rows = datasets.Dataset.from_dict({"image": [Image.fromarray(one) for one in pixels], "label": labels})
        names = datasets.ClassLabel(names=["red", "green", "blue", "yellow"])
        rows.cast_column("label", names).save_to_disk(folder / split)
    splits = {name: datasets.load_from_disk(folder / name) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(folder / "both")
    return {"dataset_name": str(folder / "both")}


def weights(folder):
    return load_file(folder / "model.safetensors")


TIMED = ("images_per_second", "data_wait_ratio")  # no two runs take as long


def log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


@pytest.mark.parametrize(
    ("model", "first", "layer", "last"),
    [
        (
            lambda: BigBirdViTForImageClassification(BigBirdViTConfig(**TINY)),
            "bigbird_vit.embeddings.cls_token",
            (".layer.1.", 2),
            "classifier.weight",
        ),
        (
            lambda: ViTForImageClassification(
                ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
            ),
            "vit.embeddings.cls_token",
            ("2.", 3),
            "classifier.weight",
        ),
        (
            lambda: ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
            "resnet.embedder.embedder.convolution.weight",
            ("stages.1.", 2),
            "classifier.1.weight",
        ),
    ],
    ids=["ours", "vit", "resnet"],
)
def test_layers_are_counted_from_the_embeddings(model, first, layer, last):
    model = model()
    depths = layer_depths(model)
    part, depth = layer
    deepest = max(depths.values())
    assert depths[first] == 0
    assert depths[last] == deepest
    assert {depths[name] for name in depths if part in name and "classifier" not in name} >= {depth}
    groups = decayed_groups(model, 0.05, 0.5)
    scales = {id(one): group["scale"] for group in groups for one in group["params"]}
    named = dict(model.named_parameters())
    assert len(scales) == len(named) - len(unseen_parameters(model))
    assert scales[id(named[first])] == 0.5**deepest
    assert scales[id(named[last])] == 1
    decays = {id(one): group["weight_decay"] for group in groups for one in group["params"]}
    assert decays[id(named[last])] == 0.05
    assert decays[id(named[last.replace("weight", "bias")])] == 0


@pytest.mark.pictures
def test_a_classifier_learns_and_works_in_a_pipeline(encoder, colours, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = FinetuneArguments(
        **colours, output_dir=str(out), max_steps=30, batch_size=20, learning_rate=3e-3, layer_decay=1.0
    )
    record = finetune_classification(encoder(), arguments)
    losses = [line["loss"] for line in log(out)]
    assert losses[-1] < 0.5 * losses[0]
    assert record["metrics"]["accuracy"] > 0.9
    assert record["details"]["pretrained_model"] == "encoder"
    assert sum(map(sum, record["details"]["confusion"])) == 20
    assert json.loads((out / "results.json").read_text())["evaluations"] == [record]
    assert (out / "classifier_confusion.png").stat().st_size > 1000
    model = AutoModelForImageClassification.from_pretrained(out)
    assert isinstance(model, BigBirdViTForImageClassification)
    assert model.config.id2label[3] == "yellow"
    image = Image.new("RGB", (50, 40), (200, 10, 10))
    assert pipeline("image-classification", model=str(out))(image)[0]["label"] == "red"
    assert "pipeline" in capsys.readouterr().out
    with pytest.raises(InputError, match="new or empty folder"):
        finetune_classification(str(out), arguments)


@pytest.mark.parametrize(
    "method",
    [
        {"mixup_alpha": 0.4},
        {"labels_per_class": 4, "consistency": True, "confidence_threshold": 0.26, "unlabelled_batch_size": 16},
    ],
    ids=["mixup", "consistency"],
)
def test_resumed_tuning_ends_with_the_same_weights(encoder, colours, tmp_path, method):
    source = encoder(drop_path_rate=0.3)
    keeping = {"checkpointing_steps": 2, "checkpoints_total_limit": 9, "logging_steps": 1}
    settings = colours | method | keeping | {"max_steps": 6, "batch_size": 16}
    whole, again = tmp_path / "whole", tmp_path / "again"
    finetune_classification(source, FinetuneArguments(**settings, output_dir=str(whole)))
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_00000006")
    (again / "model.safetensors").unlink()
    resuming = settings | {"output_dir": str(again), "resume_from_checkpoint": "latest"}
    finetune_classification(source, FinetuneArguments(**resuming | {"dataloader_num_workers": 1}))
    one, other = weights(whole), weights(again)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert log(whole) == log(again)
    with pytest.raises(InputError, match=r"`weight_decay` is 0.5, the checkpoint has 0.05"):
        finetune_classification(source, FinetuneArguments(**resuming | {"weight_decay": 0.5}))
    with pytest.raises(InputError, match="the images are not the ones it was trained on"):
        finetune_classification(source, FinetuneArguments(**resuming | {"max_train_samples": 59}))


def test_frozen_encoder_keeps_its_weights(encoder, colours, tmp_path):
    source, settings = encoder(drop_path_rate=0.3), colours | {"max_steps": 2, "batch_size": 16}
    before = weights(tmp_path / "encoder")
    for name, freeze in (("frozen", True), ("whole", False)):
        arguments = FinetuneArguments(**settings, freeze_encoder=freeze, output_dir=str(tmp_path / name))
        finetune_classification(source, arguments)
        after = weights(tmp_path / name)
        assert all(torch.equal(after[f"bigbird_vit.{key}"], before[key]) for key in before) == freeze


@pytest.mark.parametrize(
    "other",
    [
        lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
        lambda: Dinov2Model(
            Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
        ),
    ],
    ids=["resnet", "dinov2"],
)
def test_encoders_of_other_makers_are_tuned(colours, tmp_path, image_folder, other):
    other().save_pretrained(tmp_path / "other")
    BigBirdViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "other")
    arguments = FinetuneArguments(
        **colours,
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        labels_per_class=2,
        consistency=True,
        unlabelled_dir=str(image_folder(24)),
        confidence_threshold=0.05,
        unlabelled_batch_size=8,
    )
    record = finetune_classification(str(tmp_path / "other"), arguments)
    assert (record["details"]["num_labelled"], record["details"]["num_unlabelled"]) == (8, 24)
    assert record["details"]["unlabelled"] == "images"
    assert str(tmp_path) not in json.dumps(record) + (tmp_path / "out" / "finetuning.json").read_text()
    assert log(tmp_path / "out")[-1]["confident_ratio"] == 1
    assert log(tmp_path / "out")[-1]["consistency_loss"] > 0


FEW = {
    "labels_per_class": 4,
    "confidence_threshold": 0.26,
    "unlabelled_batch_size": 16,
    "batch_size": 16,
    "logging_steps": 1,
}


def command_of(colours, source):
    flags = [part for name, value in (colours | FEW).items() for part in (f"--{name}", value)]
    return ["-m", "hf_vicreg.cli", "finetune", "classification", source, *flags, "--consistency"]


@pytest.mark.slow
def test_killed_and_resumed_tuning_ends_with_the_same_weights(encoder, colours, tmp_path, run_process):
    schedule = ["--max_steps", 60, "--checkpointing_steps", 5, "--output_dir"]
    command = [sys.executable, *command_of(colours, encoder(drop_path_rate=0.3)), *schedule]
    killed = [*command, tmp_path / "killed", "--resume_from_checkpoint", "latest"]
    process = run_process.start(killed)
    deadline = time.monotonic() + 200
    while not any(path.name >= "step_00000010" for path in (tmp_path / "killed" / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline, "no checkpoint in time"
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    resumed = run_process(killed)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step_000000" in resumed.stderr
    whole = run_process([*command, tmp_path / "whole"])
    assert whole.returncode == 0, whole.stderr
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    assert any(line["consistency_loss"] > 0 for line in log(tmp_path / "whole"))


def test_tuning_stops_when_asked_with_a_checkpoint(encoder, colours, tmp_path):
    folder = tmp_path / "tuned"

    def stop_when_it_trains():
        while not (folder / "log.jsonl").exists():
            time.sleep(0.01)
        (folder / "stop").touch()

    asking = threading.Thread(target=stop_when_it_trains, daemon=True)
    asking.start()
    given = [*command_of(colours, encoder())[2:], "--max_steps", 1_000_000, "--output_dir", folder]
    assert main([str(one) for one in given]) == 75
    asking.join()
    assert not (folder / "stop").exists()  # it asked that launch alone
    assert not (folder / "model.safetensors").exists()
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step_")) == log(folder)[-1]["step"]


@pytest.mark.distributed
def test_two_processes_tune_like_one(encoder, colours, tmp_path, ranks):
    source = encoder()
    one = FinetuneArguments(**colours, **FEW, consistency=True, max_steps=4, output_dir=str(tmp_path / "one"))
    finetune_classification(source, one)
    two = ranks(2, *command_of(colours, source), "--max_steps", 4, "--output_dir", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert "2 process(es)" in two.stderr
    single, several = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in single:
        torch.testing.assert_close(several[name], single[name], rtol=1e-3, atol=1e-4)
    records = [json.loads((tmp_path / name / "results.json").read_text())["evaluations"][0] for name in ("one", "two")]
    # gradients are summed in another order, so the weights part, and an image or two of 20 may change sides
    one, other = (record["metrics"]["accuracy"] for record in records)
    assert other == pytest.approx(one, abs=2 / 20)
    assert [record["details"]["processes"] for record in records] == [1, 2]
    assert [sum(map(sum, record["details"]["confusion"])) for record in records] == [20, 20]


def test_training_pixels_are_the_processors():
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    crop = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    unchanged = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]  # factors of colour, hue, grayscale, blur, solarisation
    part = {"crops": crop[None, None], "colours": torch.tensor([[unchanged]])}
    for settings in ({}, {"image_mean": [0.5] * 3, "image_std": [0.4] * 3}, {"do_normalize": False}):
        processor = BigBirdViTImageProcessor(size={"height": 32, "width": 32}, **settings)
        found = pixel_values(part, processor, torch.device("cpu"))
        assert found.shape == (1, 1, 3, 32, 32)
        expected = processor(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_size_of_training_images_is_the_processors():
    assert image_size_of(BigBirdViTImageProcessor(size={"height": 24, "width": 40})) == (24, 40)
    assert image_size_of(BitImageProcessor(crop_size={"height": 48, "width": 48})) == (48, 48)
    assert image_size_of(ConvNextImageProcessor(size={"shortest_edge": 96})) == (96, 96)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": ""}, "`output_dir`: expected a folder for the classifier"),
        ({"dataset_name": ""}, "`dataset_name`: expected labelled images, got none"),
        ({"mixup_alpha": 0.2, "consistency": True}, "`mixup_alpha`: expected 0 with the consistency loss"),
        ({"unlabelled_dir": "somewhere"}, "`unlabelled_dir`: expected --consistency beside it"),
        ({"unlabelled_dir": "no/where", "consistency": True}, "`train_dir`: expected a folder of images"),
        ({"from_scratch": True, "freeze_encoder": True}, "`freeze_encoder`: expected pretrained weights"),
        ({"labels_per_class": 99}, "`labels`: expected at most"),
        ({"layer_decay": 1.5}, "`layer_decay`: expected a number from 0 to 1"),
        ({"learning_rate": -1.0}, "`learning_rate`: expected a number of at least 0"),
        ({"sharpening_temperature": 0.0}, "`sharpening_temperature`: expected a number above 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings_get_one_line(encoder, colours, tmp_path, changes, message):
    settings = colours | {"output_dir": str(tmp_path / "out")} | changes
    with pytest.raises(InputError) as caught:
        finetune_classification(encoder(), FinetuneArguments(**settings))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
