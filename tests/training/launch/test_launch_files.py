"""The files in training/launch: accelerate's own loader and launcher read them; the SLURM script does what it says."""

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
        ("scontrol", 'echo "$@" >> scontrol.txt; echo node1; echo node2\n'),
    ):
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}exit $(cat code 2>/dev/null || echo 0)\n")
        (commands / name).chmod(0o755)
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
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


FLAGS = ["--config", "digits", "--output_dir", "out"]


def test_slurm_script_asks_the_run_to_stop_and_queues_again(slurm, tmp_path):
    (tmp_path / "wait").touch()
    process = slurm(*FLAGS)
    deadline = time.monotonic() + 30
    while not (tmp_path / "srun.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    assert "queues again" in out
    assert "requeue 7" in (tmp_path / "scontrol.txt").read_text()
    command = (tmp_path / "srun.txt").read_text()
    assert command.startswith("torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint node1:29500")
    flags = command.split("hf_vicreg.training.pretrain", 1)[1].split()
    assert resolve(parse_flags(flags)).run.resume_from_checkpoint == "latest"


def test_slurm_script_ends_with_the_run_and_with_its_code(slurm, tmp_path):
    assert slurm(*FLAGS).wait(timeout=30) == 0
    (tmp_path / "code").write_text("1")
    (tmp_path / "commands" / "scontrol").write_text("#!/usr/bin/env bash\necho node1\n")
    assert slurm("--config", "digits", "--output_dir=out").wait(timeout=30) == 1
    process = slurm("--config", "digits")
    assert "`--output_dir`: expected a folder" in process.communicate(timeout=30)[1]
    assert process.returncode == 2
