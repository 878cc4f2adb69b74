"""The commands of the README in real processes: launching, killing, resuming, loading."""

import json
import os
import signal
import sys
import time

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_vicreg import pretrain

MODULE = "hf_vicreg.training.pretrain"


@pytest.fixture
def command(tmp_path, tiny_recipe, image_folder):
    """Returns a function that writes a recipe and returns the flags of a run over 64 random images."""
    folder = image_folder(64)

    def flags(out, **changes):
        recipe = tmp_path / f"{out}.yaml"
        recipe.write_text(yaml.safe_dump(tiny_recipe | changes))
        return ["--config", recipe, "--train_dir", folder, "--output_dir", tmp_path / out]

    flags.folder = folder
    return flags


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def launcher():
    return [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.mark.slow  # test_average.py trains with one and two in the default run
@pytest.mark.distributed
def test_one_and_two_processes_train_alike(tmp_path, tiny_recipe, command, run_process, free_port):
    changes = {"num_train_epochs": 3, "model": tiny_recipe["model"] | {"drop_path_rate": 0.0}}
    threads = torch.get_num_threads()
    pretrain(out=tmp_path / "one", data=command.folder, **tiny_recipe | changes)
    torch.set_num_threads(threads)
    several = ["--multi_gpu", "--num_processes", 2, "--main_process_port", free_port]
    two = run_process([*launcher(), *several, "-m", MODULE, *command("two", **changes)], ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr
    assert "2 process(es)" in two.stderr
    assert "attention density" in two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert len(losses(tmp_path / "two")) == 6


@pytest.mark.slow  # test_lifecycle.py kills in the default run
def test_killed_and_resumed_run_ends_with_the_same_weights(tmp_path, command, run_process):
    settings = {"num_train_epochs": 30, "checkpointing_steps": 5, "knn_every_epochs": 0}
    whole = run_process([sys.executable, "-m", MODULE, *command("whole", **settings)])
    assert whole.returncode == 0, whole.stderr

    flags = [sys.executable, "-m", MODULE, *command("killed", **settings), "--resume_from_checkpoint", "latest"]
    process = run_process.start(flags)
    deadline = time.monotonic() + 200
    while not any(path.name >= "step_00000010" for path in (tmp_path / "killed" / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline, "no checkpoint in time"
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()

    resumed = run_process(flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step_00000" in resumed.stderr
    for file in ("model.safetensors", "pretraining/model.safetensors"):
        one, other = (load_file(tmp_path / run / file) for run in ("whole", "killed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow  # a fresh process loads a saved model in the default run of test_bigbird_family.py
def test_a_fresh_python_gives_the_features_from_before_saving(tmp_path, tiny_recipe, image_folder, run_process):
    threads = torch.get_num_threads()
    result = pretrain(out=tmp_path / "run", data=image_folder(64), **tiny_recipe)
    torch.set_num_threads(1)
    try:
        images = [Image.new("RGB", (50, 60), (40 * index, 90, 10)) for index in range(4)]
        features = result.encoder(**result.processor(images, return_tensors="pt")).last_hidden_state
    finally:
        torch.set_num_threads(threads)
    save_file({"features": features.detach()}, tmp_path / "before.safetensors")
    script = tmp_path / "load.py"
    script.write_text(
        "import torch, hf_vicreg\n"
        "from PIL import Image\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoImageProcessor, AutoModel\n"
        "torch.set_num_threads(1)\n"
        "processor, model = AutoImageProcessor.from_pretrained('run'), AutoModel.from_pretrained('run')\n"
        "images = [Image.new('RGB', (50, 60), (40 * index, 90, 10)) for index in range(4)]\n"
        "features = model(**processor(images, return_tensors='pt')).last_hidden_state\n"
        "assert torch.equal(features, load_file('before.safetensors')['features'])\n"
        "print('bitwise')\n"
    )
    finished = run_process([sys.executable, script])
    assert finished.stdout.strip() == "bitwise", finished.stderr


@pytest.mark.slow  # test_light_import.py and test_user_mistakes.py ask for exit codes
def test_bad_input_ends_with_exit_code_2(tmp_path, run_process):
    finished = run_process(
        [
            sys.executable,
            "-m",
            MODULE,
            "--config",
            "digits",
            "--model.window_size",
            "2",
            "--output_dir",
            tmp_path / "run",
        ]
    )
    assert finished.returncode == 2
    assert finished.stderr.strip().splitlines() == [
        "error: `model`: `window_size`: expected an odd number of tiles, at least 1, got 2."
    ]
    assert not (tmp_path / "run").exists()
