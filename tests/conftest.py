"""Fixtures shared by all tests: no network, few threads, real processes with hard time-outs."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test but the `gpu` ones needs a GPU, and a run would take one that is there. For those name one:
# CUDA_VISIBLE_DEVICES=0.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import contextlib
import fcntl
import gc
import json
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# torch and Pillow are imported where they are used: of several processes one only hands out the tests

gc.disable()  # until the tests are collected: what is imported stays, and looking through it takes seconds


def _take_own_cores() -> None:
    """Give each of several pytest workers cores of its own: a run takes every core that it sees."""
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[int(worker[2:]) % workers % len(cores) :: workers])


_take_own_cores()

LOGS = ("out", "err")
REPOSITORY = Path(__file__).resolve().parents[1]
TRAINING = Path(__file__).resolve().parent / "training"

# A model and a run small enough for a test, as flags and as a recipe.
TINY_RECIPE = {
    "batch_size": 32,
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "knn_every_epochs": 0,
    "checkpointing_steps": 100,
    "logging_steps": 1,
    "model": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
        "pooling": "mean",
        "tile_size": 1,
        "num_random_blocks": 2,
        "drop_path_rate": 0.2,
    },
    "vicreg": {"expander_sizes": [64, 64]},
}


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads():
    """A run sets the threads of its process; give them back."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Runs of `tests/training` draw no curves, as without matplotlib, but where a test is marked `pictures`.

    To draw them takes longer than all else of a run that a test trains.
    """
    if TRAINING in request.path.parents and not request.node.get_closest_marker("pictures"):
        for name in ("matplotlib", "matplotlib.figure"):
            monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def tiny_recipe():
    """The settings of a run that takes seconds, a fresh copy."""
    import copy

    return copy.deepcopy(TINY_RECIPE)


@pytest.fixture
def image_folder(tmp_path):
    """Returns a function that fills a folder with distinct PNG images and returns it."""

    def make(count: int = 40, size: int = 36, name: str = "images") -> Path:
        import torch
        from PIL import Image

        folder = tmp_path / name
        folder.mkdir()
        generator = torch.Generator().manual_seed(count)
        for index in range(count):
            pixels = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=generator).numpy()
            Image.fromarray(pixels).save(folder / f"{index:04d}.png")
        return folder

    return make


@pytest.fixture
def one_core():
    """All processes keep to one core: their threads, of which there are as many as cores, sum in one order."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs sched_setaffinity")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture
def free_port():
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child_environment(**extra: str) -> dict[str, str]:
    """Environment of child processes: one thread, loopback only, this checkout first."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    return environment | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONWARNINGS": "default",
        "COLUMNS": "200",
        **extra,
    }


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Returns a function that runs a program, as after `python`, in several processes, and kills them after a time.

    With `machines` they are shared out over so many; see `ranks.py`. What they return has the exit code of each.
    """
    folder, server = tmp_path_factory.mktemp("ranks"), []

    def run(
        count: int, *program: object, timeout_s: float = 240, machines: int | None = None
    ) -> subprocess.CompletedProcess:
        if not server:
            command = [sys.executable, REPOSITORY / "tests" / "ranks.py"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            server.append(subprocess.Popen(command, env=child_environment(), start_new_session=True, **pipes))
        process, order = server[0], {"world_size": count, "program": [str(part) for part in program]}
        order |= {"folder": str(folder), "log": str(folder / "log"), "machines": machines}
        print(json.dumps(order), file=process.stdin, flush=True)
        if not select.select([process.stdout], [], [], timeout_s)[0]:
            _kill_group(server.pop())
            raise TimeoutError(f"{order} took more than {timeout_s} s")
        codes = json.loads(process.stdout.readline())
        out, err = ("".join((folder / f"log.{rank}.{name}").read_text() for rank in range(count)) for name in LOGS)
        done = subprocess.CompletedProcess(order["program"], next((one for one in codes if one), 0), out, err)
        done.codes = codes
        return done

    yield run
    for process in server:
        _kill_group(process)
        process.communicate()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Returns a function that has a file made by the first worker that asks for it, and gives its path to all."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "made_once"
    folder.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], None]) -> Path:
        path = folder / name
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when the file is closed, or its process killed
            if not path.exists():
                temporary = path.with_name(f"{name}.tmp")
                make(temporary)
                temporary.rename(path)
        return path

    return get


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium; what its pages download is in its `downloads`."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with its driver; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    profile = tmp_path_factory.mktemp("profile")
    for one in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", f"user-data-dir={profile}"):
        options.add_argument(f"--{one}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    found.set_page_load_timeout(120)
    found.downloads = tmp_path_factory.mktemp("downloads")
    behaviour = {"behavior": "allow", "downloadPath": str(found.downloads)}
    found.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    yield found
    found.quit()


@pytest.fixture
def run_process(tmp_path):
    """Returns a function that runs a command in its own process group, and kills the group after `timeout_s`."""
    started = []

    def start(command: list[str], **extra: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=tmp_path,
            env=child_environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    def run(command: list[str], timeout_s: float = 240, **extra: str) -> subprocess.CompletedProcess:
        process = start(command, **extra)
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        finally:
            _kill_group(process)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    run.start = start
    yield run
    for process in started:
        _kill_group(process)
        process.communicate()


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
