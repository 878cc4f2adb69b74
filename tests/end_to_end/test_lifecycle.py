"""Runs that are killed, asked to stop, poisoned or left without room: what is lost, and what their end equals."""

import contextlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from hf_vicreg.training.engine.checkpoint import find_damage, list_checkpoints

STEPS = 20
MODULE = "hf_vicreg.training.pretrain"
REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


class Forks:
    """Starts runs as forks of one process; see `worker_forks.py`."""

    def __init__(self, folder, environment):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("worker_forks.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.children = []

    def start(self, out, world_size=1, wrong=None, images=None, **changes):
        """Start a run in `out`, which may be the folder of an earlier one; returns its process ids."""
        recipe = yaml.safe_load((self.folder / "recipe.yaml").read_text()) | changes
        (self.folder / "changed.yaml").write_text(yaml.safe_dump(recipe))
        flags = ["--config", self.folder / "changed.yaml", "--train_dir", images or self.folder / "images"]
        flags += ["--output_dir", out, "--resume_from_checkpoint", "latest"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = self.folder / f"log_{out.name}"
        order = {"flags": list(map(str, flags)), "world_size": world_size, "port": port, "log": str(self.log)}
        order |= {"wrong": wrong} if wrong else {}
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        self.children = self._answer()
        return self.children

    def finish(self, timeout_s=120):
        """Return the exit codes of the run; it is killed after the time."""
        return self._answer(timeout_s)

    def run(self, out, world_size=1, **options):
        """Start a run, wait for its end and return its exit codes."""
        self.start(out, world_size, **options)
        return self.finish()

    def said(self, rank=0):
        return Path(f"{self.log}.{rank}").read_text()

    def _answer(self, timeout_s=120):
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        assert ready, f"no answer in {timeout_s} s: {self.said()}"
        return json.loads(self.process.stdout.readline())

    def end(self):
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, request):
    """A folder with images and a recipe of 20 steps, a checkpoint after each, and runs that nothing disturbs."""
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).resolve().parents[1] / "conftest.py"))
    folder = tmp_path_factory.mktemp("lifecycle")
    (folder / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(40):
        pixels = torch.randint(0, 256, (36, 36, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(folder / "images" / f"{index:04d}.png")
    recipe = conftest.TINY_RECIPE | {"batch_size": 16, "max_steps": STEPS, "checkpointing_steps": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    forks = Forks(folder, conftest.child_environment())
    yield forks
    forks.end()


@pytest.fixture
def forks(shared):
    yield shared
    for child in shared.children:  # a failed test may have left them
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


@pytest.fixture
def undisturbed(shared):
    """Returns a function that gives the folder of an undisturbed run, made once."""

    def make(world_size=1, **changes):
        out = shared.folder / "_".join(["whole", str(world_size), *map(str, changes.values())])
        if not out.exists():
            assert shared.run(out, world_size, **changes) == [0] * world_size, shared.said()
            if world_size > 1:
                assert f"{world_size} process(es)" in shared.said()
        return out

    return make


def assert_same_end(one, other):
    """Both runs have the same weights, bit for bit, and the same log of losses."""
    for file in ("model.safetensors", "pretraining/model.safetensors"):
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(one) == losses(other)


def lines_of(path):
    return path.read_text().count("\n") if path.exists() else 0


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def wait_for(condition, what, timeout_s=60, pause_s=0.002):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {timeout_s} s"
        time.sleep(pause_s)


def newest_step(out):
    found = list_checkpoints(out / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0


@pytest.mark.parametrize(
    ("world_size", "kills", "workers", "steps", "sharded"),
    [
        pytest.param(1, 3, 0, STEPS, False, id="3-kills"),
        pytest.param(1, 20, 0, 160, False, id="20-kills", marks=pytest.mark.slow),
        pytest.param(1, 20, 2, 160, False, id="20-kills-2-workers", marks=pytest.mark.slow),
        pytest.param(2, 5, 0, 80, False, id="2-processes-5-kills", marks=[pytest.mark.distributed, pytest.mark.slow]),
        pytest.param(2, 1, 0, STEPS, False, id="2-processes-1-kill", marks=pytest.mark.distributed),
        pytest.param(2, 20, 0, 80, True, id="sharded-20-kills", marks=[pytest.mark.distributed, pytest.mark.slow]),
    ],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_killed_at_any_moment_it_ends_with_the_same_weights(
    world_size, kills, workers, steps, sharded, forks, undisturbed, tmp_path
):
    settings = {"max_steps": steps, "dataloader_num_workers": workers, "shard_weights": sharded}
    out, whole = tmp_path / "killed", undisturbed(world_size, max_steps=steps, shard_weights=sharded)
    moments = random.Random(kills)
    while_writing = 0
    for kill in range(kills):
        before = newest_step(out)
        victims = forks.start(out, world_size, **settings)
        wait_for(lambda before=before: newest_step(out) > before, "new checkpoint")
        if kill % 2:
            time.sleep(moments.uniform(0, 0.4))  # anywhere in a few steps
        else:
            wait_for(lambda: any((out / "checkpoints").glob(".writing_*")), "checkpoint being written", pause_s=0)
        victim = moments.choice(victims)
        os.kill(victim, signal.SIGKILL)
        if moments.random() < 0.5:  # or the others notice by themselves
            for one in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
        codes = forks.finish()
        assert codes[victims.index(victim)] == -signal.SIGKILL, (codes, forks.said())
        assert 0 not in codes
        while_writing += any((out / "checkpoints").glob(".writing_*"))
    assert while_writing >= kills // 3
    assert forks.run(out, world_size, **settings) == [0] * world_size, forks.said()
    assert "resumed from step_" in forks.said()
    assert not list((out / "checkpoints").glob(".*"))  # what the kills left behind is gone
    assert_same_end(out, whole)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_means_checkpoint_and_exit_code_75(name, forks, undisturbed, tmp_path):
    out = tmp_path / "stopped"
    settings = {"checkpointing_steps": 1000}
    (child,) = forks.start(out, wrong=["sleep", 0, 5, 2], **settings)
    wait_for(lambda: lines_of(out / "log.jsonl") == 5, "fifth step")
    os.kill(child, signal.Signals[name])
    assert forks.finish() == [75], forks.said()
    step = newest_step(out)
    assert 0 < step < STEPS
    assert f"stopped by {name} at step {step} of {STEPS}; go on with --resume_from_checkpoint latest" in forks.said()
    assert not (out / "model.safetensors").exists()
    assert forks.run(out, **settings) == [0]
    assert_same_end(out, undisturbed())


def test_a_second_interrupt_ends_at_once(forks, tmp_path):
    out = tmp_path / "hasty"
    (child,) = forks.start(out, wrong=["sleep", 0, 2, 20])
    wait_for(lambda: newest_step(out) == 2, "second step")
    time.sleep(0.2)
    began = time.monotonic()
    os.kill(child, signal.SIGINT)
    time.sleep(0.3)
    os.kill(child, signal.SIGINT)
    assert forks.finish() == [-signal.SIGINT]
    assert time.monotonic() - began < 10
    assert find_damage(list_checkpoints(out / "checkpoints")[-1]) is None


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_signal_to_the_whole_group_leaves_the_loaders_their_work(forks, undisturbed, tmp_path):
    out = tmp_path / "group"
    (child,) = forks.start(out, dataloader_num_workers=2)
    wait_for((out / "log.jsonl").exists, "step")
    os.killpg(child, signal.SIGTERM)
    assert forks.finish() == [75], forks.said()
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(child, 0)
    assert forks.run(out) == [0]
    assert_same_end(out, undisturbed())


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all_at_the_same_step(forks, undisturbed, tmp_path):
    out, settings = tmp_path / "one_rank", {"checkpointing_steps": 1000}
    children = forks.start(out, 2, wrong=["sleep", 0, 5, 2], **settings)
    wait_for(lambda: lines_of(out / "log.jsonl") == 5, "fifth step")
    os.kill(children[1], signal.SIGTERM)  # not the main process
    assert forks.finish() == [75, 75], forks.said()
    assert "2 process(es)" in forks.said()
    assert "stopped by SIGTERM at step" in forks.said()
    assert 0 < newest_step(out) < STEPS
    assert forks.run(out, 2, **settings) == [0, 0]
    assert_same_end(out, undisturbed(2))


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["loss", pytest.param("gradient", marks=pytest.mark.slow)])
def test_nan_on_one_rank_skips_the_step_on_all(kind, forks, tmp_path):
    ends = []
    for rank in (0, 1):  # whoever it is, nobody's weights move
        out = tmp_path / f"nan_{rank}"
        assert forks.run(out, 2, wrong=[kind, rank, 5], max_steps=8) == [0, 0], forks.said()
        assert "2 process(es)" in forks.said()
        assert json.loads((out / "results.json").read_text())["skipped_steps"] == 1
        ends.append(out)
    one, other = (load_file(end / "pretraining" / "model.safetensors") for end in ends)
    assert all(torch.equal(one[name], other[name]) and one[name].isfinite().all() for name in one)
    states = [load_file(end / "checkpoints" / "step_00000008" / "optimizer.safetensors") for end in ends]
    assert states[0]["0.step"] == 7


@pytest.fixture
def small_disk(tmp_path):
    """Returns a function that sets the size in KiB of a file system in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, timeout=30
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system of a few hundred KiB cannot be mounted here")

    def resize(kib):
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True, timeout=30)
        return disk

    yield resize
    subprocess.run(["umount", "-l", str(disk)], check=True, timeout=30)


@pytest.mark.parametrize(
    "world_size",
    [1, pytest.param(2, marks=[pytest.mark.distributed, pytest.mark.slow])],
    ids=["1-process", "2-processes"],
)
def test_a_full_disk_is_told_and_older_checkpoints_stay(world_size, forks, undisturbed, small_disk, tmp_path):
    whole = undisturbed(world_size)
    size = sum(path.stat().st_size for path in list_checkpoints(whole / "checkpoints")[-1].iterdir()) // 1024
    out = small_disk(4 * size) / "run"
    settings = {"checkpoints_total_limit": 100}
    assert forks.run(out, world_size, **settings) == [2] * world_size, forks.said()
    (error,) = [line for line in forks.said().splitlines() if line.startswith("error: ")]
    assert "`output_dir`: expected room to write in" in error
    assert "Traceback" not in forks.said()
    assert "Traceback" not in forks.said(world_size - 1)
    kept = list_checkpoints(out / "checkpoints")
    assert kept
    assert all(find_damage(path) is None for path in kept)
    assert not list((out / "checkpoints").glob(".*"))
    filler = out / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:  # not a byte is left
        while file.write(bytes(4096)):
            file.flush()
    recipe = (out / "recipe.yaml").read_bytes()
    assert forks.run(out, world_size, **settings) == [2] * world_size, forks.said()
    assert "`output_dir`: expected room to write in" in forks.said()
    assert "Traceback" not in forks.said()
    assert (out / "recipe.yaml").read_bytes() == recipe
    filler.unlink()
    small_disk(40 * size)
    assert forks.run(out, world_size, **settings) == [0] * world_size, forks.said()
    assert_same_end(out, whole)


def test_a_disk_that_is_full_at_the_start_leaves_a_folder_to_start_in(forks, small_disk):
    out = small_disk(64) / "run"
    out.mkdir()
    filler = out.parent / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while file.write(bytes(4096)):
            file.flush()
    assert forks.run(out) == [2], forks.said()
    assert "`output_dir`: expected room to write in" in forks.said()
    assert not list(out.iterdir())
    filler.unlink()
    (out / "recipe.yaml.tmp").write_text("what a kill leaves")
    small_disk(20_000)
    assert forks.run(out) == [0], forks.said()
    assert not list(out.glob("*.tmp"))


def test_an_image_that_disappears_is_replaced_and_counted(forks, tmp_path):
    out = tmp_path / "lost"
    victim = forks.folder / "images" / "0039.png"
    content = victim.read_bytes()
    forks.start(out)
    wait_for((out / "log.jsonl").exists, "step")
    victim.unlink()
    try:
        assert forks.finish() == [0], forks.said()
    finally:
        victim.write_bytes(content)
    assert json.loads((out / "results.json").read_text())["unusable_images"] == 1
    assert "0039.png" in forks.said()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_run_with_loaders_that_stops_or_fails_leaves_at_once(forks, tmp_path):
    assert forks.run(tmp_path / "s", max_time=0, dataloader_num_workers=2) == [75], forks.said()
    images = tmp_path / "images"
    images.mkdir()
    for index in range(16):  # one that is readable, or the run would not begin, and is not there later
        shutil.copy(forks.folder / "images" / f"{index:04d}.png", images)
    forks.start(tmp_path / "f", images=images, max_steps=100_000, dataloader_num_workers=2)
    wait_for((tmp_path / "f" / "log.jsonl").exists, "step")
    for path in images.iterdir():
        path.unlink()
    assert forks.finish() == [2], forks.said()
    assert "expected usable images, found 64 drawn in a row" in forks.said()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/cmdline"), reason="needs /proc")
def test_accelerate_with_one_process_is_stopped_though_it_passes_no_signal_on(
    forks, run_process, undisturbed, tmp_path
):
    out = tmp_path / "launched"
    config = ["--config_file", REPOSITORY / "training" / "launch" / "cpu.yaml"]
    process = run_process.start([*LAUNCHER, *config, "-m", MODULE, *flags(forks, out)])
    wait_for((out / "log.jsonl").exists, "step", timeout_s=200)
    process.send_signal(signal.SIGTERM)  # the launcher dies at once, and leaves its child behind
    process.wait(timeout=60)
    _, said = process.communicate(timeout=120)  # ends when the child does
    assert process.returncode != 0
    assert "stopped by its launcher ended at step" in said
    cores = len(os.sched_getaffinity(0))
    assert f"1 process(es), {cores} threads each" in said  # though the launcher sets one OpenMP thread
    step = newest_step(out)
    assert 0 < step < STEPS
    assert forks.run(out) == [0]
    assert losses(out) == pytest.approx(losses(undisturbed()), rel=1e-3)  # other threads, other rounding


@pytest.mark.distributed
@pytest.mark.slow
def test_accelerate_with_two_processes_passes_the_signal_on(forks, run_process, free_port, tmp_path):
    out = tmp_path / "launched"
    several = ["--multi_gpu", "--num_processes", 2, "--main_process_port", free_port]
    command = [*LAUNCHER, *several, "-m", MODULE, *flags(forks, out), "--max_steps", 2000]
    process = run_process.start(command, ACCELERATE_USE_CPU="true")
    wait_for((out / "log.jsonl").exists, "step", timeout_s=200)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "2 process(es)" in said
    assert "stopped by SIGTERM at step" in said
    assert find_damage(list_checkpoints(out / "checkpoints")[-1]) is None
    assert f"at step {newest_step(out)} of 2000" in said


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_tells_the_exit_code_of_a_rank(forks, run_process, tmp_path):
    out = tmp_path / "launched"
    command = [*TORCHRUN, "-m", MODULE, *flags(forks, out), "--max_time", 0]
    finished = run_process([*command], ACCELERATE_USE_CPU="true")
    assert "stopped by --max_time is over at step 1 of" in finished.stderr
    assert finished.returncode == 1  # torchrun's own
    assert "exitcode  : 75" in finished.stderr
    again = run_process([*TORCHRUN, "--max_restarts", 3, *command[len(TORCHRUN) :]], ACCELERATE_USE_CPU="true")
    assert again.returncode == 0, again.stderr  # asked to stop, it is not started again
    assert newest_step(out) == 2


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_starts_again_after_a_killed_rank(forks, run_process, undisturbed, tmp_path):
    out = tmp_path / "launched"
    command = [*TORCHRUN, "--max_restarts", 2, "-m", MODULE, *flags(forks, out)]
    # as the guide says: else a restart may be lost on addresses of the start before
    process = run_process.start(command, ACCELERATE_USE_CPU="true", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    for restart in range(2):
        before = newest_step(out)
        wait_for(
            lambda before=before: newest_step(out) > before + 2 or process.poll() is not None,
            "third checkpoint",
            timeout_s=200,
        )
        ranks = [int(pid) for pid in children_of(process.pid)]
        assert len(ranks) == 2
        os.kill(ranks[restart], signal.SIGKILL)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert said.count("resumed from step_") == 2
    assert "2 process(es)" in said
    assert losses(out) == pytest.approx(losses(undisturbed(2)), rel=1e-3)


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def flags(forks, out):
    where = ["--train_dir", forks.folder / "images", "--output_dir", out, "--resume_from_checkpoint", "latest"]
    return ["--config", forks.folder / "recipe.yaml", *where]
