"""A Hub on loopback, a run to publish, and processes that talk to it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from hf_vicreg import pretrain

HERE = Path(__file__).parent
specification = importlib.util.spec_from_file_location("loopback_hub", HERE / "loopback_hub.py")
loopback_hub = importlib.util.module_from_spec(specification)
sys.modules["loopback_hub"] = loopback_hub  # its dataclasses look for their module
specification.loader.exec_module(loopback_hub)

SMALL = {"knn_train_samples": 200, "knn_test_samples": 50, "knn_neighbours": 5}
TOKEN, STRANGER, READER = loopback_hub.ACCOUNTS


@pytest.fixture
def hub():
    """A Hub with nothing in it."""
    with loopback_hub.LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, request):
    """A finished run, after a second of training on digits; tests only read it."""
    conftest = request.config.pluginmanager.get_plugin(str(HERE.parent / "conftest.py"))
    folder = tmp_path_factory.mktemp("runs") / "run"
    threads = torch.get_num_threads()
    settings = conftest.TINY_RECIPE | {"knn_every_epochs": 1, "num_train_epochs": 2} | SMALL
    pretrain(out=folder, data="digits", max_train_samples=96, **settings)
    torch.set_num_threads(threads)  # a run sets them
    return folder


@pytest.fixture
def environment(hub, tmp_path):
    """What a process needs to take the loopback Hub for the Hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": TOKEN,
    }


@pytest.fixture
def publishing(run_process, environment, tmp_path):
    """Returns a function that does the worker's steps in a process of its own and returns what each gave."""

    def do(steps, **extra):
        asked, out = tmp_path / "steps.json", tmp_path / "out.json"
        asked.write_text(json.dumps(steps))
        finished = run_process([sys.executable, HERE / "worker_publishing.py", asked, out], 500, **environment | extra)
        assert finished.returncode == 0, finished.stderr
        found = json.loads(out.read_text())
        assert all(token not in finished.stdout + finished.stderr + out.read_text() for token in (TOKEN, STRANGER))
        return found

    return do
