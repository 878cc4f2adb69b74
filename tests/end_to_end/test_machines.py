"""Several machines, as several `accelerate launch` on this one: they train as one does, resume, and end together."""

import json
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_vicreg.training.engine.checkpoint import find_damage

pytestmark = [pytest.mark.slow, pytest.mark.distributed]  # test_meeting.py has forks in the default run
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
FILES = Path(__file__).resolve().parents[2] / "training" / "launch"
STEPS, EVERY = 6, 3  # of four steps an epoch


@pytest.fixture
def flags(tmp_path, tiny_recipe):
    """Returns a function that gives the flags of a run of six steps on the digits, with a k-NN and two checkpoints."""
    recipe = tiny_recipe | {
        "dataset_name": "digits",
        "batch_size": 16,
        "max_steps": STEPS,
        "checkpointing_steps": EVERY,
    }
    recipe |= {"max_train_samples": 64, "knn_train_samples": 32, "knn_test_samples": 16, "knn_neighbours": 5}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"knn_every_epochs": 1}))

    def of(out, *more):
        own = ["--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / out, "--device", "cpu"]
        return ["-m", "hf_vicreg.training.pretrain", *own, "--resume_from_checkpoint", "latest", *more]

    return of


@pytest.fixture
def machines(run_process):
    """Returns a function that starts two launchers of `multi_node.yaml` and waits for both."""

    def run(processes, rendezvous, *flags, second=(), timeout_s=240):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = ["--config_file", FILES / "multi_node.yaml", "--num_processes", processes, *rendezvous]
        shared += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        started = []
        for rank, own in ((0, ()), (1, second)):
            started.append(run_process.start([*LAUNCHER, *shared, "--machine_rank", rank, *flags, *own]))
            if not rank:  # with c10d any machine of the address would serve the store, and here both have it
                _wait_for_port(port, started[0])
        ends = [process.communicate(timeout=timeout_s) for process in started]
        return [process.returncode for process in started], [error for _, error in ends]

    return run


def _wait_for_port(port, process):
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)


def assert_same_end(one, other):
    """Both runs have the same weights, bit for bit, the same losses and accuracies, and whole checkpoints."""
    for file in ("model.safetensors", "pretraining/model.safetensors"):
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, other)]
    figures = [[line.get(name) for line in log for name in ("step", "loss", "knn_accuracy")] for log in logs]
    assert figures[0] == figures[1]
    assert sum("loss" in line for line in logs[0]) == STEPS
    assert any("knn_accuracy" in line for line in logs[0])
    for run in (one, other):
        checkpoints = sorted((run / "checkpoints").iterdir())
        assert [path.name for path in checkpoints] == [f"step_{step:08d}" for step in (EVERY, STEPS)]
        assert [find_damage(path) for path in checkpoints] == [None, None]


C10D = ["--rdzv_backend", "c10d"]


@pytest.mark.parametrize(
    ("processes", "rendezvous", "more"),
    [
        (2, [], []),
        (4, C10D, []),
        (2, C10D, ["--shard_weights"]),
        (4, [], ["--shard_weights"]),
        (4, C10D, ["--shard_weights", "--dp_shard_size", 2]),
    ],
    ids=["2-static", "4-c10d", "2-c10d-shared", "4-static-shared", "4-c10d-copies"],
)
def test_two_launchers_train_as_one_does_and_resume(
    processes, rendezvous, more, flags, machines, run_process, one_core, free_port, tmp_path
):
    several = ["--config_file", FILES / "multi_gpu.yaml", "--num_processes", processes]
    one = run_process([*LAUNCHER, *several, "--main_process_port", free_port, *flags("one", *more)])
    assert one.returncode == 0, one.stderr
    assert f"device cpu, {processes} process(es), 1 threads each" in one.stderr
    codes, said = machines(processes, rendezvous, *flags("two", *more))
    assert codes == [0, 0], said
    assert "".join(said).count(f"device cpu, {processes} process(es), 1 threads each") == 1  # the first process alone
    assert_same_end(tmp_path / "one", tmp_path / "two")

    _back_to(tmp_path / "two", EVERY)
    codes, said = machines(processes, rendezvous, *flags("two", *more))
    assert codes == [0, 0], said
    assert "".join(said).count(f"resumed from step_{EVERY:08d}") == 1
    assert_same_end(tmp_path / "one", tmp_path / "two")


def _back_to(folder, step):
    """Leave a finished run as one that was killed after a step."""
    shutil.rmtree(folder / "checkpoints" / f"step_{STEPS:08d}")
    for name in ("model.safetensors", "config.json", "results.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "pretraining")


BAD = ["--model.window_size", "2"]
SAID = "error: `model`: `window_size`: expected an odd number of tiles, at least 1, got 2."


@pytest.mark.parametrize("rendezvous", [[], C10D], ids=["static", "c10d"])
@pytest.mark.parametrize("both", [True, False])
def test_bad_input_ends_both_launchers(both, rendezvous, flags, machines, tmp_path):
    began = time.monotonic()
    codes, said = machines(2, rendezvous, *flags("bad", *(BAD if both else ())), second=() if both else BAD)
    assert codes == [1, 1]  # a launcher's own; the run's is in what it says
    assert ["exitcode  : 2 " in one for one in said] == [True, True]
    lines = [line for one in said for line in one.splitlines() if line.startswith("error: ")]
    assert all(line.startswith(SAID) for line in lines)
    assert len(lines) == (1 if both else 2)
    assert not (tmp_path / "bad").exists()
    assert time.monotonic() - began < 200  # and not after half an hour
