"""`--shard_weights`: the same training as with whole weights, an n-th of the memory, resumed with any number."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.launch.sharding import gathered, is_sharded, own_share, placed_like, unsharded, whole
from hf_vicreg.training.pretrain import pretrain
from hf_vicreg.training.run.resolve import resolve

pytestmark = pytest.mark.distributed
MODULE = "hf_vicreg.training.pretrain"
MAX_NORM = 0.5  # that the worker clips to
ALL_CASES = ["one-pass", "two-passes", "local-views"]
WORKER = Path(__file__).with_name("worker_sharding.py")


@pytest.mark.parametrize(
    ("processes", "sizes", "steps", "cases"),
    [
        (4, [2], 2, ["two-passes"]),
        pytest.param(2, [2, 1], 20, ALL_CASES, marks=pytest.mark.slow),
        pytest.param(4, [4, 2, 1], 20, ALL_CASES, marks=pytest.mark.slow),
    ],
    ids=["4", "2-all", "4-all"],
)
def test_shared_weights_train_like_whole_ones(processes, sizes, steps, cases, ranks, tmp_path):
    asked = [steps, ",".join(map(str, sizes)), *cases]
    done = ranks(processes, WORKER, tmp_path / "found.safetensors", *asked)
    assert done.returncode == 0, done.stderr
    assert f"{processes} processes" in done.stdout
    found = load_file(tmp_path / "found.safetensors")
    for case in cases:
        names = [name for name in found if name.startswith(f"{case} whole ")]
        assert len(names) > 40  # losses, norms, weights, moments and averages
        for name in names:
            for size in sizes:
                other = found[name.replace(" whole ", f" shared by {size} ")]
                torch.testing.assert_close(other, found[name], rtol=0, atol=1e-10)
        first, last = (found[f"{case} whole loss {step}"] for step in (0, steps - 1))
        assert abs(first - last) > 1e-3
        assert min(found[f"{case} whole norm {step}"] for step in range(steps)) > 2 * MAX_NORM


@pytest.fixture
def start(tmp_path, tiny_recipe, ranks):
    """Returns a function that trains in a folder with some processes, and gives what they said."""
    recipe = tiny_recipe | {"batch_size": 16, "max_steps": 8, "checkpointing_steps": 2, "checkpoints_total_limit": 9}
    recipe |= {"max_train_samples": 64, "knn_train_samples": 32, "knn_test_samples": 16, "knn_neighbours": 5}
    recipe |= {"knn_every_epochs": 1, "ema_decay": 0.9, "statistics_batch_size": 32, "dataset_name": "digits"}
    # paths are dropped by numbers of each process's own
    recipe["model"] = recipe["model"] | {"drop_path_rate": 0.0}

    def run(folder, processes, *, shared, expected=0, **changes):  # changes of the recipe
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"shard_weights": shared} | changes))
        flags = ["--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / folder]
        done = ranks(processes, "-m", MODULE, *flags, "--resume_from_checkpoint", "latest")
        assert done.returncode == expected, done.stderr
        assert f"{processes} process(es)" in done.stderr
        return tmp_path / folder, done.stderr

    return run


def back_to(folder, step):
    """Leave a finished run as one that was killed after a step."""
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    for name in ("model.safetensors", "config.json", "results.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "pretraining")


def weights_of(folder):
    return load_file(folder / "model.safetensors") | {
        f"whole {name}": one for name, one in load_file(folder / "pretraining" / "model.safetensors").items()
    }


# other numbers of processes sum in another order, and AdamW divides by what it summed; a step is up to 1e-3
ROUNDING = 1e-4


def assert_close(one, other, atol):
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=atol)


def test_a_run_of_two_goes_on_to_the_bit_and_with_whole_weights(start, tmp_path):
    steps = {"max_steps": 4}
    shared, _ = start("shared", 2, shared=True, **steps)
    by_one, _ = start("whole", 1, shared=False, **steps)
    assert_close(shared, by_one, ROUNDING)
    logs = [[json.loads(line) for line in (one / "log.jsonl").read_text().splitlines()] for one in (shared, by_one)]
    found, expected = ([one["knn_accuracy"] for one in log if "knn_accuracy" in one] for log in logs)
    assert len(found) >= 1
    assert found == pytest.approx(expected, abs=2.1 / 16)  # an image or two of 16 may change sides
    shutil.copytree(shared, tmp_path / "again")
    back_to(tmp_path / "again", 2)
    again, said = start("again", 2, shared=True, **steps)
    assert "resumed from step_00000002" in said
    assert_close(again, shared, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moves",
    [
        [(2, 4, True, None), (4, 2, False, None), (6, 4, True, None), (2, 1, True, None), (4, 1, False, None)],
        # from two copies in four processes to one in two, to four in four, back to two, and to whole weights
        [(2, 4, True, 2), (4, 2, True, 2), (4, 4, True, 1), (6, 4, True, 2), (4, 1, False, None)],
    ],
    ids=["one-copy", "copies"],
)
def test_a_run_goes_on_with_other_numbers_of_processes(moves, start, tmp_path):
    undisturbed, _ = start("undisturbed", 2, shared=True)
    shutil.copytree(undisturbed, tmp_path / "moved")
    for step, processes, shared, size in moves:
        back_to(tmp_path / "moved", step)
        moved, said = start("moved", processes, shared=shared, dp_shard_size=size)
        assert f"resumed from step_{step:08d}" in said
        assert_close(moved, undisturbed, ROUNDING)


def test_an_objective_with_a_head_of_its_own_is_refused(start, tmp_path):
    _, said = start("head", 2, shared=True, expected=2, objective="byol", ema_decay=0.0, statistics_batch_size=None)
    (line,) = {line for line in said.splitlines() if line.startswith("error: ")}
    assert line.startswith("error: `shard_weights`: expected an objective without weights beside encoder and expander")
    assert not (tmp_path / "head").exists()


@pytest.mark.slow
def test_processes_that_do_not_divide_are_one_line(start, tmp_path):
    _, said = start("odd", 3, shared=True, expected=2, dp_shard_size=2)
    (line,) = {line for line in said.splitlines() if line.startswith("error: ")}
    assert line.startswith("error: `dp_shard_size`: expected a divisor of 3 process(es), got 2; choose from 1, 3.")
    assert "Traceback" not in said
    assert not (tmp_path / "odd").exists()


def test_one_process_does_not_divide_by_two(tiny_recipe, tmp_path):
    settings = tiny_recipe | {"max_train_samples": 32, "shard_weights": True, "dp_shard_size": 2, "device": "cpu"}
    with pytest.raises(InputError, match=r"`dp_shard_size`: expected a divisor of 1 process\(es\), got 2"):
        pretrain(out=tmp_path / "odd", data="digits", **settings)
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_weights": False, "dp_shard_size": 2}, "`dp_shard_size`: expected `shard_weights` beside it"),
        ({"dp_shard_size": 0}, "`dp_shard_size`: expected at least 1, got 0"),
        ({"torch_compile": True}, "`torch_compile`: expected false with --shard_weights, got True"),
        ({"optim": "lars"}, "`optim`: expected 'adamw' with --shard_weights, got 'lars'"),
        ({"mixed_precision": "fp16"}, "`mixed_precision`: expected 'bf16' or 'no' with --shard_weights"),
        ({"teacher": "somebody"}, "`teacher`: expected none with --shard_weights"),
        ({"caption_column": ["text"], "dataset_name": "x/y"}, "`caption_column`: expected none with --shard_weights"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(changes, message, tiny_recipe):
    settings = tiny_recipe | {"output_dir": "out", "dataset_name": "digits", "shard_weights": True} | changes
    with pytest.raises(InputError, match=message):
        resolve(settings)


def test_whole_tensors_stay_as_they_are():
    tensor, module = torch.randn(3, 2), torch.nn.Linear(2, 2)
    assert not is_sharded(tensor)
    assert not is_sharded(module)
    assert whole(tensor) is own_share(tensor) is placed_like(tensor, tensor) is tensor
    assert unsharded(module) is module
    held = gathered({"a": tensor}, keep=True)["a"]
    assert torch.equal(held, tensor)
    assert held.data_ptr() != tensor.data_ptr()
    assert gathered({"a": tensor}, keep=False) == {}
