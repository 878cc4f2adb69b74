"""The files in training/launch: accelerate's own loader and launcher read them; the SLURM script does what it says."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from hf_vicreg.training.run.flags import parse_flags
from hf_vicreg.training.run.resolve import resolve

FOLDER = Path(__file__).resolve().parents[3] / "training" / "launch"
EXPECTED = {  # distributed type, processes, machines
    "cpu": ("NO", 1, 1),
    "one_gpu": ("NO", 1, 1),
    "multi_gpu": ("MULTI_GPU", 8, 1),
    "multi_node": ("MULTI_GPU", 16, 2),
}


def test_every_file_is_expected():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_file(name, monkeypatch):
    for key in [key for key in os.environ if key.startswith("ACCELERATE_")]:
        monkeypatch.delenv(key)
    path = str(FOLDER / f"{name}.yaml")
    config = load_config_from_file(path)
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == EXPECTED[name]
    assert config.use_cpu == (name == "cpu")
    flags = ["--config_file", path, "--main_process_ip", "127.0.0.1", "-m", "hf_vicreg.training.pretrain", "--help"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    assert arguments.num_processes == EXPECTED[name][1]
    assert bool(arguments.multi_gpu) == (EXPECTED[name][0] == "MULTI_GPU")
    assert arguments.num_machines == EXPECTED[name][2]


@pytest.fixture
def slurm(tmp_path):
    """Returns a function that runs slurm.sh where `srun`, `scontrol` and `torchrun` only write down what they get."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, body in (
        # the run: ends at once, or when it finds the stop file, as the real one does
        ("srun", 'echo "$@" > srun.txt; if [[ -e wait ]]; then until [[ -e out/stop ]]; do sleep 0.02; done; fi\n'),
        (
            "scontrol",
            'echo "$@" >> scontrol.txt\n'
            'case "$1 $2" in\n'
            '    "show hostnames") printf "node1\\nnode2\\n";;\n'
            '    "show job") echo "JobId=7 JobState=$(cat state) Reason=None";;\n'
            "    *) [[ ! -e refuses ]];;\n"
            "esac\n",
        ),
    ):
        end = "exit $(cat code 2>/dev/null || echo 0)\n" if name == "srun" else ""
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}{end}")
        (commands / name).chmod(0o755)
    (tmp_path / "state").write_text("RUNNING")
    started = []

    def start(*flags):
        environment = os.environ | {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
        }
        process = subprocess.Popen(
            ["bash", FOLDER / "slurm.sh", *flags],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):  # also what a script that died has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


FLAGS = ["--config", "digits", "--output_dir", "out"]


@pytest.fixture
def interrupted(slurm, tmp_path):
    """Returns a function that runs the script, sends it signals once the run has begun, and returns what it said."""
    (tmp_path / "wait").touch()

    def run(*numbers):
        process = slurm(*FLAGS)
        deadline = time.monotonic() + 30
        while not (tmp_path / "srun.txt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for number in numbers:
            process.send_signal(number)
        out, error = process.communicate(timeout=30)
        assert process.returncode == 75, error
        return out, error, (tmp_path / "scontrol.txt").read_text()

    return run


@pytest.mark.parametrize("numbers", [[signal.SIGUSR1], [signal.SIGTERM], [signal.SIGTERM, signal.SIGUSR1]])
def test_slurm_script_asks_the_run_to_stop_and_queues_again(numbers, interrupted, tmp_path):
    out, _, asked = interrupted(*numbers)
    assert "queues again" in out
    assert asked.count("requeue 7") == 1
    command = (tmp_path / "srun.txt").read_text()
    assert command.startswith("torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint node1:20007")
    flags = command.split("hf_vicreg.training.pretrain", 1)[1].split()
    assert resolve(parse_flags(flags)).run.resume_from_checkpoint == "latest"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_slurm_script_of_a_cancelled_job_does_not_queue_again(state, interrupted, tmp_path):
    (tmp_path / "state").write_text(state)
    out, _, asked = interrupted(signal.SIGTERM)
    assert "does not queue again" in out
    assert "requeue" not in asked


def test_slurm_script_says_so_where_it_may_not_queue_again(interrupted, tmp_path):
    (tmp_path / "refuses").touch()
    assert "error: `scontrol requeue` failed; submit the same command again" in interrupted(signal.SIGUSR1)[1]


def test_slurm_script_of_a_run_that_finished_after_all_ends_with_0(slurm, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "wait").touch()
    process = slurm(*FLAGS)
    deadline = time.monotonic() + 30
    while not (tmp_path / "srun.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (tmp_path / "out" / "results.json").touch()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert "requeue" not in (tmp_path / "scontrol.txt").read_text()


def test_slurm_script_ends_with_the_run_and_with_its_code(slurm, tmp_path):
    assert slurm(*FLAGS).wait(timeout=30) == 0
    (tmp_path / "code").write_text("1")
    assert slurm("--config", "digits", "--output_dir=out").wait(timeout=30) == 1
    process = slurm("--config", "digits")
    assert "`--output_dir`: expected a folder" in process.communicate(timeout=30)[1]
    assert process.returncode == 2
