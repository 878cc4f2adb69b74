"""A folder is one run's at a time."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from accelerate import Accelerator

from hf_vicreg import pretrain
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.run import run_folder
from hf_vicreg.training.run.run_folder import alone_in

HOLDS = """
import sys, time
from pathlib import Path
import multiprocessing
from accelerate import Accelerator
from hf_vicreg.training.run.run_folder import alone_in
with alone_in(Path(sys.argv[1]), Accelerator(cpu=True)):
    loader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    loader.start()
    print(loader.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process, with a loader process of its own, that is in the folder `run`; and the loader's id."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        loader = int(process.stdout.readline())
        try:
            yield process
        finally:
            process.kill()
            os.kill(loader, signal.SIGKILL)


def test_a_second_run_in_a_folder_is_refused(other, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0.5)
    model = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    flags = {"max_steps": 1, "batch_size": 16, "device": "cpu", "vicreg": {"expander_sizes": [8, 8]}}
    with pytest.raises(InputError, match="no run is writing to, another one is in"):
        pretrain(out=tmp_path / "run", data="digits", model=model | {"image_size": 16, "patch_size": 4}, **flags)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_killed_run_is_waited_for_and_its_loaders_hold_nothing(other, tmp_path):
    timer = threading.Timer(1.0, other.kill)
    timer.start()
    began = time.monotonic()
    with alone_in(tmp_path / "run", Accelerator(cpu=True)):
        assert time.monotonic() - began < run_folder.PATIENCE_S
        assert other.wait(timeout=10) == -signal.SIGKILL
    timer.join()


def test_a_folder_is_free_after_a_run_and_where_there_are_no_locks(tmp_path, monkeypatch):
    for _ in range(2):
        with alone_in(tmp_path / "run", Accelerator(cpu=True)):
            assert len(run_folder._held) == 1
    assert not run_folder._held

    def unsupported(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with alone_in(tmp_path / "run", Accelerator(cpu=True)):
        pass
