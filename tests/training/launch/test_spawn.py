"""`hf-vicreg pretrain --num_processes N`: several real processes, quiet, ended together, with the run's exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hf_vicreg.training.launch import spawn
from hf_vicreg.training.launch.signals import PARENT, StopReason, StopRequest

pytestmark = pytest.mark.distributed
COMMAND = [sys.executable, "-m", "hf_vicreg.cli", "pretrain", "images", "--config", "tiny.yaml"]
TWO = ["--num_processes", "2"]
QUIET = {"PYTHONWARNINGS": "ignore"}


@pytest.fixture
def workplace(tmp_path, tiny_recipe, image_folder):
    """A folder with 64 images and a recipe for them."""
    image_folder(64)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    return tmp_path


def test_two_processes_share_a_batch_and_choose_one_folder(workplace, run_process):
    finished = run_process([*COMMAND, *TWO], **QUIET)
    assert finished.returncode == 0, finished.stderr
    (folder,) = (workplace / "runs").iterdir()
    assert "device cpu, 2 process(es), " in finished.stderr
    assert "batch 32, 2 steps" in finished.stderr  # 64 images: of both processes together
    assert (folder / "model.safetensors").exists()
    assert json.loads((folder / "results.json").read_text())["steps"] == 2
    for word in ("Warning", "Traceback", "W1", "torchrun", "elastic"):
        assert word not in finished.stderr
    assert finished.stdout.count("The encoder is in") == 1


@pytest.mark.slow
def test_bad_input_that_every_process_meets_is_one_line(workplace, run_process):
    finished = run_process([*COMMAND, "--num_processes=2", "--device", "cuda", "--output_dir", "out"], **QUIET)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: `device`: expected one that this machine has, found no 'cuda'")
    assert not (workplace / "out").exists()


@pytest.mark.slow  # test_lifecycle.py stops two ranks in the default run
def test_a_signal_stops_all_of_them_with_a_checkpoint(workplace, run_process):
    flags = ["--output_dir", "out", "--num_train_epochs", "100000", "--logging_steps", "1"]
    process = run_process.start([*COMMAND, *TWO, *flags], **QUIET)
    log = workplace / "out" / "log.jsonl"
    deadline = time.monotonic() + 200
    while not log.exists() or not log.read_text():
        assert time.monotonic() < deadline, "no step in time"
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)  # to the one that was started, and not to its group
    _, said = process.communicate(timeout=40)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert list((workplace / "out" / "checkpoints").glob("step_*"))
    assert len(children) == 2
    assert not any(os.path.exists(f"/proc/{child}") for child in children)


def test_the_others_are_not_waited_for_when_one_has_failed(monkeypatch):
    monkeypatch.setattr(spawn, "GRACE_SECONDS", 0.3)
    waiting, failing, killed = (
        subprocess.Popen([sys.executable, "-c", code])
        for code in (
            "import time; time.sleep(600)",
            "raise SystemExit(75)",
            "import os; os.kill(os.getpid(), 9)",
        )
    )
    try:
        assert spawn._wait([waiting, failing]) == 75
        assert waiting.poll() is None
        assert spawn._wait([failing]) == 75
        assert spawn._wait([killed]) == 128 + 9
    finally:
        waiting.kill()
        waiting.wait()


def test_a_process_knows_that_it_is_one_of_several(tmp_path, monkeypatch):
    assert StopRequest(tmp_path, None).launcher is None
    monkeypatch.setenv(PARENT, str(os.getppid()))
    assert StopRequest(tmp_path, None).reason() == StopReason.NONE
    monkeypatch.setenv(PARENT, str(os.getpid()))  # as if that one had ended before, and another was the parent now
    assert StopRequest(tmp_path, None).reason() == StopReason.LAUNCHER_GONE
