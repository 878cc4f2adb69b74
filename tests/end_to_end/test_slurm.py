"""training/launch/slurm.sh with real runs of two nodes: they drain on real signals, queue again, and lose nothing."""

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_vicreg.training.engine.checkpoint import find_damage

pytestmark = [pytest.mark.slow, pytest.mark.distributed]  # test_launch_files.py has the script alone
SCRIPT = Path(__file__).resolve().parents[2] / "training" / "launch" / "slurm.sh"
STEPS = 300
# stand-ins: each node is this machine; srun, as the real one, passes SIGTERM on to its tasks
SRUN = """#!/usr/bin/env bash
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do "$@" & tasks+=($!); done
echo "${tasks[@]}" > tasks
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; done
    wait "$task" || code=$?
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") echo 127.0.0.1 ;;
    "show job") echo "JobId=$3 JobState=RUNNING Reason=None" ;;
    *) echo "$@" >> requeued ;;
esac
"""


@pytest.fixture
def submit(tmp_path, run_process, tiny_recipe):
    """Returns a function that starts the script, as SLURM does for a new job and for one that was queued again."""
    recipe = tiny_recipe | {"dataset_name": "digits", "max_train_samples": 64, "batch_size": 16, "max_steps": STEPS}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    job = _job_with_a_free_port()
    place = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def start():
        flags = ["--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "run", "--device", "cpu"]
        return run_process.start(["bash", SCRIPT, *flags], **place, SLURM_GPUS_ON_NODE="1", PATH=path)

    start.job = job
    return start


def _job_with_a_free_port():
    for job in range(os.getpid(), os.getpid() + 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", 20000 + job % 10000))
            except OSError:
                continue
            return job
    raise AssertionError("no free port")


def steps_of(folder):
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_run_drains_on_signals_queues_again_and_ends_as_the_undisturbed_one(submit, ranks, one_core, tmp_path):
    run = tmp_path / "run"

    def interrupt(number, to_tasks, reason):
        """Start the job, signal it when it has taken a few steps, and return the step that it stopped at."""
        before, process = len(steps_of(run)), submit()
        deadline = time.monotonic() + 200
        while len(steps_of(run)) < before + 3:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        if to_tasks:
            for task in (tmp_path / "tasks").read_text().split():
                os.kill(int(task), number)
        else:
            process.send_signal(number)  # to the shell alone, as with `B:`
        out, said = process.communicate(timeout=200)
        assert (process.returncode == 75) is not to_tasks, said
        assert process.returncode != 0
        assert said.count("device cpu, 2 process(es), 1 threads each") == 1
        (stopped,) = re.findall(rf"stopped by {reason} at step (\d+) of {STEPS}; go on with", said)
        assert int(stopped) > before
        assert find_damage(run / "checkpoints" / f"step_{int(stopped):08d}") is None
        assert not (run / "stop").exists()
        assert not (run / "results.json").exists()
        if before:
            assert f"resumed from step_{before:08d}" in said
        return out

    assert "queues again" in interrupt(signal.SIGUSR1, False, "the stop file")
    assert "queues again" in interrupt(signal.SIGTERM, False, "the stop file")
    # SLURM may signal the tasks alone and queues again by itself then: the script does not know
    assert "queues again" not in interrupt(signal.SIGTERM, True, "SIGTERM")
    assert (tmp_path / "requeued").read_text().splitlines() == [f"requeue {submit.job}"] * 2
    last = submit()
    _, said = last.communicate(timeout=300)
    assert last.returncode == 0, said
    assert (run / "results.json").exists()

    whole = ["--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "whole", "--device", "cpu"]
    done = ranks(2, "-m", "hf_vicreg.training.pretrain", *whole, machines=2)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stderr
    for file in ("model.safetensors", "pretraining/model.safetensors"):
        first, second = load_file(run / file), load_file(tmp_path / "whole" / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [[line["loss"] for line in steps_of(folder)] for folder in (run, tmp_path / "whole")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
