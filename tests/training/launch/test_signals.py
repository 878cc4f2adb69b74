"""What stops a run: a file, a time limit, signals, a launcher that is gone; and with which exit code."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from hf_vicreg import pretrain
from hf_vicreg.training.errors import RunStopped
from hf_vicreg.training.launch.signals import StopReason, StopRequest, outlive_signals, stop_exit_code

# for processes that need nothing else of the package, whose import takes seconds
BY_PATH = (
    "import importlib.util, sys\n"
    f"spec = importlib.util.spec_from_file_location('signals', {outlive_signals.__code__.co_filename!r})\n"
    "signals = sys.modules['signals'] = importlib.util.module_from_spec(spec); spec.loader.exec_module(signals)\n"
)


def test_time_limit_and_stop_file_stop_a_run_that_can_go_on(tmp_path, tiny_recipe, image_folder):
    settings = tiny_recipe | {"batch_size": 16, "data": image_folder(40), "max_steps": 5}
    out = tmp_path / "run"
    with pytest.raises(RunStopped, match="stopped by --max_time is over at step 1 of 5; go on with --resume"):
        pretrain(out=out, max_time=0, **settings)
    (out / "stop").touch()
    with pytest.raises(RunStopped, match="stopped by the stop file at step 2 of 5"):
        pretrain(out=out, resume_from_checkpoint="latest", max_time=60, **settings)
    assert not (out / "stop").exists()  # it asked that launch, not the next one
    whole = pretrain(out=tmp_path / "whole", **settings)
    resumed = pretrain(out=out, resume_from_checkpoint="latest", **settings)
    assert resumed.results["steps"] == 5
    for one, two in zip(whole.encoder.parameters(), resumed.encoder.parameters(), strict=True):
        assert torch.equal(one, two)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are given back


def test_signals_are_remembered_and_the_gravest_is_told(tmp_path):
    stop = StopRequest(tmp_path, None)
    before = signal.getsignal(signal.SIGINT)
    with stop:
        assert stop.reason() == StopReason.NONE
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason() == StopReason.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the second one is the kernel's
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason() == StopReason.SIGTERM
    assert signal.getsignal(signal.SIGINT) == before


def test_another_thread_leaves_signals_alone(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def body():
        with StopRequest(tmp_path, 0) as stop:
            seen.extend([signal.getsignal(signal.SIGTERM), stop.reason()])

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before, StopReason.MAX_TIME]


def test_exit_code_is_75_and_0_where_a_launcher_would_start_again(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    assert stop_exit_code() == 75
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert stop_exit_code() == 75
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert stop_exit_code() == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/cmdline"), reason="needs /proc")
@pytest.mark.parametrize("name", ["accelerate", "accelerate-of-mine.py"])
def test_a_launcher_that_ends_is_noticed_and_a_script_is_not(name, tmp_path, run_process):
    # the parent ends at once and leaves its child behind, as `accelerate launch` does on SIGTERM
    child = (
        f"{BY_PATH}import time; from pathlib import Path\n"
        "stop = signals.StopRequest(Path('.'), None); Path('ready').touch()\n"
        "while not Path('gone').exists(): time.sleep(0.01)\n"
        "time.sleep(0.2); Path('reason').write_text(stop.reason().name)\n"
    )
    parent = tmp_path / name
    parent.write_text(
        "import subprocess, sys, time, os\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "while not os.path.exists('ready'): time.sleep(0.01)\n"
    )
    process = run_process.start([sys.executable, parent])
    process.wait(timeout=120)
    (tmp_path / "gone").touch()
    deadline = time.monotonic() + 30
    while not (tmp_path / "reason").exists() or not (tmp_path / "reason").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (tmp_path / "reason").read_text() == ("LAUNCHER_GONE" if name == "accelerate" else "NONE")


def test_loader_processes_outlive_a_signal_but_not_for_ever():
    code = (
        f"{BY_PATH}import os, signal\n"
        "signals.WORKER_GRACE_S = 1\n"
        "signals.outlive_signals(0)\n"
        "os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('alive', flush=True)\n"
        "signal.pause()\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert finished.stdout == "alive\n"
    assert finished.returncode == -signal.SIGALRM
    assert outlive_signals.__module__ == "hf_vicreg.training.launch.signals"  # spawned loaders import it by name
