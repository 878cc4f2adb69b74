"""What a plan leaves of its time to the measurements of a run."""

import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

import hf_vicreg
from hf_vicreg.training.evaluation.online_probe import linear_accuracy
from hf_vicreg.training.images.run_images import load_images
from hf_vicreg.training.planner import measuring
from hf_vicreg.training.planner.choices import Images
from hf_vicreg.training.planner.machine import Machine
from hf_vicreg.training.planner.measuring import linear_seconds, measuring_seconds
from hf_vicreg.training.planner.schedule import Rate
from hf_vicreg.training.planner.trial import Trial
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.texts.captions import Captions

TRIAL = Trial(Rate(1.0, 1, 16), 1.0, 0.0, read_seconds=1.0, encode_seconds=2.0, retrieval_seconds=5.0, parameters=1)
CPU = Machine("cpu", "a CPU", 1, 2**30)
SAMPLES = {"knn_train_samples": 30, "knn_test_samples": 10}


@pytest.fixture
def config(tiny_recipe):
    return resolve(tiny_recipe | SAMPLES | {"dataset_name": "digits", "output_dir": "x"})


def seconds(config, held_out, machine=CPU, **run):
    changed = replace(config, run=replace(config.run, **run))
    return measuring_seconds(changed, Images(100, 8, 8, held_out.captions is None), held_out, machine, TRIAL)


def test_everything_that_is_measured_counts(config, monkeypatch):
    held_out = load_images(config)[2]
    assert seconds(config, held_out) == (40 + 40 * 3, 40 * 3)  # pixels and the untrained encoder; then the trained one
    assert seconds(config, held_out, ema_decay=0.9) == (160, 2 * 120)  # averages and the weights themselves
    assert seconds(config, held_out, Machine("cpu", "a CPU", 1, 2**30, 4)) == (40, 30)
    asked = []
    monkeypatch.setattr(measuring, "linear_seconds", lambda *sizes: asked.append(sizes) or 7.0)
    assert seconds(config, held_out, linear_probe=True) == (160 + 2 * 7, 120 + 7)
    assert asked == [(30, 3 * 32 * 32, 10), (30, config.vicreg.encoder.hidden_size, 10)]
    captioned = replace(held_out, captions=Captions([], [], None))
    assert seconds(config, captioned, ema_decay=0.9) == (0, 10 * 5.0)
    assert measuring_seconds(config, Images(100, 8, 8, False), None, CPU, TRIAL) == (0, 0)


def test_a_linear_probe_is_tried_for_a_few_iterations():
    assert linear_seconds(40, 16, 3) > 0
    rows, labels = torch.randn(60, 8), torch.arange(60) % 3
    rows[:, 0] += 3 * labels
    assert linear_accuracy(rows, labels, rows, labels, iterations=1) <= linear_accuracy(rows, labels, rows, labels)


def test_a_plan_of_images_with_captions_has_its_retrieval(tmp_path, capsys):
    for split, count in (("train", 32), ("test", 8)):
        (tmp_path / split).mkdir()
        lines = [f'{{"file_name": "{at}.png", "text": "a wall, number {at}"}}' for at in range(count)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
        for at in range(count):
            Image.new("RGB", (36, 36), (7 * at, 90, 30)).save(tmp_path / split / f"{at}.png")
    text = {"model_type": "distilbert", "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "vocab_size": 300}
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    settings = {"caption_column": ["text"], "image_column_name": "image", "second_model": text, "max_text_length": 12}
    settings |= {"model": small, "batch_size": 16, "time_budget": "20m", "plan_only": True}
    hf_vicreg.pretrain(data=tmp_path, out=tmp_path / "run", **settings)
    assert re.search(r"retrieval +every \d+ epochs +at most a twelfth of the time", capsys.readouterr().out)
