"""Several machines, acted by launchers of their own on this one; and SLURM's script with a real run below it."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT = Path(__file__).resolve().parents[3] / "training" / "launch" / "slurm.sh"
PRETRAIN = ["-m", "hf_vicreg.training.pretrain"]
RUN = ["--config", "digits", "--knn_every_epochs", "0", "--checkpointing_steps", "2", "--seed", "3"]
WEIGHTS = ("model.safetensors", "pretraining/model.safetensors")


@pytest.fixture
def two_nodes(run_process, free_port):
    """Returns a function that runs the same command by two launchers, of so many processes each."""
    ports = iter(range(free_port, free_port + 20, 2))

    def start(processes: int, *flags: str):
        place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{next(ports)}", "--rdzv_id", "x"]
        nodes = [
            run_process.start(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", rank),
                    *("--nproc_per_node", processes, *place, *PRETRAIN, *RUN, *flags),
                ]
            )
            for rank in range(2)
        ]
        ends = [node.communicate(timeout=300) for node in nodes]
        return [node.returncode for node in nodes], [error for _, error in ends]

    return start


def weights(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in WEIGHTS]


@pytest.mark.parametrize("shared", [[], ["--shard_weights"]], ids=["whole", "shared"])
def test_two_launchers_train_what_one_does_and_go_on(two_nodes, run_process, tmp_path, shared):
    one = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *PRETRAIN, *RUN]
    alone = run_process([*one, "--max_steps", "4", "--output_dir", "one", *shared])
    assert alone.returncode == 0, alone.stderr
    codes, errors = two_nodes(1, "--max_steps", "4", "--output_dir", "two", *shared)
    assert codes == [0, 0], errors
    assert "device cpu, 2 process(es)" in errors[0] + errors[1]
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    # a part of it by two launchers of two processes each, the rest by one of two
    recipe = ["--max_steps", "4", "--output_dir", "three", *shared]
    codes, errors = two_nodes(2, *recipe, "--max_time", "0.0001")  # over after the first step
    assert "device cpu, 4 process(es)" in errors[0] + errors[1]
    assert codes == [1, 1], errors  # torchrun's own, 75 in its report
    assert "exitcode  : 75" in errors[0] + errors[1]
    (folder,) = (tmp_path / "three" / "checkpoints").iterdir()
    assert folder.name == "step_00000001"
    gone_on = run_process([*one, *recipe, "--resume_from_checkpoint", "latest"])
    assert gone_on.returncode == 0, gone_on.stderr


def test_bad_input_gets_one_line_from_both_launchers(two_nodes, tmp_path):
    codes, errors = two_nodes(1, "--max_steps", "4", "--output_dir", "bad", "--batch_size", "7")
    assert codes == [1, 1]
    for error in errors:
        assert error.count("error: `batch_size`: expected a multiple of 2 processes, got 7.") == 1
    assert not (tmp_path / "bad").exists()


def test_slurm_script_drains_a_real_run_and_goes_on(run_process, free_port, tmp_path):
    commands = tmp_path / "commands"
    commands.mkdir()
    torchrun = f'exec "{sys.executable}" -m torch.distributed.run "$@"'
    for name, body in (
        ("srun", '"$@"'),  # one node: here
        ("scontrol", 'echo "$@" >> scontrol.txt; echo 127.0.0.1'),
        ("torchrun", torchrun),
    ):
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    job = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "MASTER_PORT": str(free_port),
    }
    command = ["bash", SCRIPT, *RUN, "--max_steps", "30", "--output_dir", "drained"]
    first = run_process.start(command, **job)
    log, deadline = tmp_path / "drained" / "log.jsonl", time.monotonic() + 120
    while not log.exists() or '"loss"' not in log.read_text():
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)  # as SLURM does to a job that has to make room
    out, error = first.communicate(timeout=120)
    assert first.returncode == 0, error
    assert "the job queues again" in out
    assert "requeue 7" in (tmp_path / "scontrol.txt").read_text()
    assert not (tmp_path / "drained" / "results.json").exists()
    second = run_process(command, **job)
    assert second.returncode == 0, second.stderr
    assert "queues again" not in second.stdout
    one = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *PRETRAIN, *RUN]
    whole = run_process([*one, "--max_steps", "30", "--output_dir", "whole"])
    assert whole.returncode == 0, whole.stderr
    assert weights(tmp_path / "drained") == weights(tmp_path / "whole")
    assert yaml.safe_load((tmp_path / "drained" / "recipe.yaml").read_text())["max_steps"] == 30
