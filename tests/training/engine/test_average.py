"""The average of weights: its formula, what it leaves alone, and its way through checkpoints and the run's folder."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from hf_vicreg import pretrain
from hf_vicreg.training.engine.average import WeightAverage
from hf_vicreg.training.errors import InputError


def weights(folder, part="model.safetensors"):
    return load_file(folder / part)


def test_the_average_is_its_formula():
    decay, generator = 0.97, torch.Generator().manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    average = WeightAverage([encoder], decay)
    tensors = {**dict(encoder.named_parameters()), "1.running_mean": encoder[1].running_mean}
    expected = {}
    for count in range(200):
        with torch.no_grad():
            for one in tensors.values():
                one += torch.randn(one.shape, generator=generator, dtype=torch.float64)
            encoder[1].num_batches_tracked += 1
        average.update()
        followed = min(decay, (1 + count) / (10 + count))
        for name, one in tensors.items():
            now = one.detach().clone()
            expected[name] = now if count == 0 else followed * expected[name] + (1 - followed) * now
    (found,) = average.averages
    assert not found.training
    state = found.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-7, atol=1e-7)
    assert state["1.num_batches_tracked"] == 200
    assert not any(one.requires_grad for one in found.parameters())


@pytest.fixture
def recipe(tiny_recipe):
    few = {"knn_train_samples": 96, "knn_test_samples": 20, "knn_neighbours": 5, "max_train_samples": 96}
    schedule = {"knn_every_epochs": 1, "num_train_epochs": 2, "checkpointing_steps": 2, "device": "cpu"}
    return tiny_recipe | few | schedule


def test_training_does_not_notice(tmp_path, recipe):
    with_average = pretrain(out=tmp_path / "one", data="digits", ema_decay=0.9, **recipe)
    pretrain(out=tmp_path / "other", data="digits", **recipe)
    one, other = (weights(tmp_path / name / "pretraining") for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    exported, raw = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert exported.keys() == raw.keys()
    assert not any(torch.equal(exported[name], raw[name]) for name in exported if "weight" in name)
    accuracies = with_average.results["knn_accuracy"]
    assert accuracies.keys() == {"raw_pixels", "untrained", "trained", "raw_trained"}
    (line,) = [
        one
        for one in map(json.loads, (tmp_path / "one" / "log.jsonl").read_text().splitlines())
        if "knn_accuracy" in one
    ]
    assert "raw_knn_accuracy" in line
    own = with_average.encoder.state_dict()
    assert all(torch.equal(own[name].cpu(), exported[name]) for name in exported)
    assert "its weights, not averaged" in (tmp_path / "one" / "README.md").read_text()


def test_a_resumed_average_is_the_same(tmp_path, recipe):
    settings = recipe | {"ema_decay": 0.9}
    pretrain(out=tmp_path / "whole", data="digits", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000006")
    (tmp_path / "again" / "model.safetensors").unlink()
    pretrain(out=tmp_path / "again", data="digits", resume_from_checkpoint="latest", **settings)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(InputError, match=r"`ema_decay` is 0.5, the checkpoint has 0.9"):
        pretrain(
            out=tmp_path / "again", data="digits", resume_from_checkpoint="latest", **settings | {"ema_decay": 0.5}
        )


@pytest.mark.distributed
def test_two_processes_average_like_one(tmp_path, image_folder, ranks, tiny_recipe):
    tiny_recipe["model"]["drop_path_rate"] = 0.0  # every process draws its own
    recipe = tmp_path / "recipe.yaml"
    settings, folder = tiny_recipe | {"ema_decay": 0.5, "num_train_epochs": 2}, image_folder(64)
    recipe.write_text(yaml.safe_dump(settings))
    pretrain(out=tmp_path / "one", data=folder, **settings)
    program = ["-m", "hf_vicreg.training.pretrain", folder, "--config", recipe, "--output_dir", tmp_path / "two"]
    done = ranks(2, *program)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    raw = weights(tmp_path / "two" / "pretraining")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(two[name], raw[f"encoder.{name}"]) for name in two)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_out_of_range_is_refused(tmp_path, tiny_recipe, image_folder, decay):
    with pytest.raises(InputError, match="`ema_decay`: expected"):
        pretrain(out=tmp_path / "run", data=image_folder(40), **tiny_recipe | {"ema_decay": decay})
    assert not (tmp_path / "run").exists()
