"""Processes of several machines: the same training as on one, and bad input that one of them meets ends all."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.launch import meeting

MODULE = "hf_vicreg.training.pretrain"
WORKER = Path(__file__).with_name("worker_machines.py")


@pytest.fixture
def flags(tmp_path, tiny_recipe):
    """Returns a function that writes a recipe of a short run on the digits and returns its flags."""

    def make(out, **changes):
        recipe = tiny_recipe | {"dataset_name": "digits", "max_train_samples": 64, "batch_size": 16, "max_steps": 3}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
        return ["--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / out]

    return make


@pytest.mark.distributed  # tests/end_to_end/test_machines.py has the launchers themselves
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "shared"])
def test_two_machines_train_as_one_does(shared, flags, ranks, tmp_path):
    for machines in (1, 2):
        done = ranks(2, "-m", MODULE, *flags(f"{machines}", shard_weights=shared), machines=machines)
        assert done.returncode == 0, done.stderr
        assert "device cpu, 2 process(es), 1 threads each" in done.stderr
    assert_same_run(tmp_path / "1", tmp_path / "2", steps=3)


def assert_same_run(one, other, steps):
    for file in ("model.safetensors", "pretraining/model.safetensors"):
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, other)]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == steps


BAD = "--model.window_size=2"
SAID = "error: `model`: `window_size`: expected an odd number of tiles, at least 1, got 2."


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("others", "flag", "lines"),
    [
        ("0,1,2,3", BAD, [SAID]),
        ("3", BAD, [f"{SAID} (Process 3, on HOST.)"]),
        pytest.param("0", BAD, [SAID], marks=pytest.mark.slow),
        # of the third of four, the first process of the second machine: it says so, and the first one relays it
        pytest.param("2", BAD, [f"{SAID} (Process 2, on HOST.)", SAID], marks=pytest.mark.slow),
        # refused before there are settings
        pytest.param("2,3", "--no_such_flag=1", ["error: `--no_such_flag`: unknown flag"] * 2, marks=pytest.mark.slow),
    ],
)
def test_bad_input_on_any_machine_ends_all_of_them(others, flag, lines, flags, ranks, tmp_path):
    done = ranks(4, WORKER, others, flag, *flags("out"), machines=2, timeout_s=60)
    # whoever met it, or came to hear of it, ends by itself, unless the launcher of its machine was faster
    assert set(done.codes) <= {2, -15}, done.stderr
    assert {done.codes[0], done.codes[1]} & {2}
    assert {done.codes[2], done.codes[3]} & {2}
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    host = meeting.socket.gethostname()
    assert len(said) == len(lines)
    assert all(one.startswith(line.replace("HOST", host)) for one, line in zip(said, lines, strict=True)), said
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_one_process_meets_nobody(monkeypatch, capsys):
    for name in meeting.PLACE:
        monkeypatch.delenv(name, raising=False)
    meeting.meet()
    meeting.refuse(InputError("`x`: a."))
    assert capsys.readouterr().err == ""
    assert meeting.end_with(InputError("`x`: a.")) == 2
    assert capsys.readouterr().err == "error: `x`: a.\n"


@pytest.mark.distributed
def test_nobody_is_waited_for_once_the_first_process_has_gone(ranks, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys\n"
        "from hf_vicreg.training.errors import RelayedError\n"
        "from hf_vicreg.training.launch import meeting\n"
        "if os.environ['RANK'] != '1':\n"
        "    meeting._store(60)  # all connect: the first one serves\n"
        "    os._exit(0)\n"
        "try:\n"
        "    meeting.meet()\n"
        "except RelayedError as error:\n"
        "    sys.exit(meeting.end_with(error) * 10)\n"
    )
    done = ranks(3, worker, machines=3, timeout_s=60)
    assert done.codes == [0, 20, 0], done.stderr
    assert "error: " not in done.stderr  # what went wrong, the first one knows
