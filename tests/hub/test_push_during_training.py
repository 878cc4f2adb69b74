"""`--push_to_hub`: what a run leaves on the Hub while it trains and at its end, and what it does without one."""

import json
import sys
import threading

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from loopback_hub import ACCOUNTS
from safetensors.torch import load, load_file

from hf_vicreg.training import command

MODULE = "hf_vicreg.training.pretrain"
TOKEN, _, READER = ACCOUNTS


@pytest.fixture
def training(run_process, environment, tiny_recipe, tmp_path):
    """Returns a function that runs a pretraining on 96 digits, and gives its process and folder."""
    recipe = tiny_recipe | {"knn_train_samples": 96, "knn_test_samples": 20, "knn_neighbours": 5}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))

    def run(*flags, **extra):
        out = tmp_path / "run"
        where = ["--config", tmp_path / "tiny.yaml", "--dataset_name", "digits", "--output_dir", out]
        command = [sys.executable, "-m", MODULE, *where, "--max_train_samples", 96, "--push_to_hub", *flags]
        return run_process(command, 400, **environment | extra), out

    return run


@pytest.mark.slow
def test_checkpoints_are_pushed_one_at_a_time_and_then_the_finished_run(hub, training, environment):
    several = ["--hub_strategy", "checkpoint", "--checkpointing_steps", 1, "--max_steps", 4]
    finished, out = training("--hub_model_id", "writer/live", *several)
    assert finished.returncode == 0, finished.stderr
    assert "step 1: http" in finished.stderr
    assert "step 1 is still being pushed, step 2 is left to the next one" in finished.stderr
    assert "the finished run: http" in finished.stderr
    assert not (out / "hub_snapshot").exists()
    repository = hub.repositories["writer/live"]
    _, first, last = repository.commits.values()  # the Hub's own one comes first
    assert repository.tree() == last
    assert "1 of 4 planned: this run is not finished" in first["README.md"].decode()
    card = last["README.md"].decode()
    assert "not finished" not in card
    assert ModelCard(card).data.library_name == "transformers"
    assert json.loads(first["results.json"])["steps"] == 1
    assert "trained" not in json.loads(first["results.json"])["knn_accuracy"]
    weights = load_file(out / "model.safetensors")
    then, now = (load(one["model.safetensors"]) for one in (first, last))
    assert all(torch.equal(now[name], weights[name]) for name in weights)
    assert any(not torch.equal(then[name], weights[name]) for name in weights)
    # where it was pushed to is not what somebody who trains it again wants
    assert "hub_model_id" not in yaml.safe_load(last["recipe.yaml"])
    token = environment["HF_TOKEN"].encode()
    assert not any(token in path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert token.decode() not in finished.stdout + finished.stderr


REFUSED = {
    "no token": ("writer/x", None, "`push_to_hub`: expected a token with write access, got none"),
    "wrong token": ("writer/x", "hf_wrong", "`push_to_hub`: the token is not accepted"),
    "reader": ("writer/x", READER, "`push_to_hub`: expected a token with write access, this one may only read"),
    "owner": ("nobody/x", TOKEN, "`hub_model_id`: expected one of the token's owners ['writer', 'lab'], got 'nobody'"),
    "no owner": ("writer", TOKEN, "`hub_model_id`: expected OWNER/NAME with --push_to_hub, got 'writer'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_push_that_cannot_succeed_is_told_before_training(name, hub, tmp_path, tiny_recipe, monkeypatch, capsys):
    from huggingface_hub import constants

    repo, token, message = REFUSED[name]
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # both are read from the environment, but at the import
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    where = ["--config", tmp_path / "tiny.yaml", "--dataset_name", "digits", "--output_dir", tmp_path / "run"]
    flags = [str(one) for one in [*where, "--max_train_samples", 96, "--push_to_hub", "--hub_model_id", repo]]
    assert command.main(flags) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_hub_that_fails_costs_a_warning_and_not_the_run(hub, training):
    hub.fault("POST", "writer/live/commit", 403)
    finished, out = training("--hub_model_id", "writer/live")
    assert finished.returncode == 0, finished.stderr
    assert "the finished run was not pushed: `repo`: expected to publish the files" in finished.stderr
    assert f"`hf-vicreg publish {out} --repo writer/live` does it by hand" in finished.stderr
    assert (out / "model.safetensors").exists()


@pytest.mark.slow
def test_a_run_that_stops_does_not_wait_for_the_hub(hub, training, tmp_path):
    silent = hub.fault("POST", "writer/live/commit", "hang")
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def stop_when_it_hangs():
        assert silent.seen.wait(300)
        (tmp_path / "run" / "stop").touch()

    asking = threading.Thread(target=stop_when_it_hangs)
    asking.start()
    steps = ["--hub_strategy", "checkpoint", "--checkpointing_steps", 1, "--max_steps", 1_000_000]
    finished, out = training("--hub_model_id", "writer/live", *steps, TMPDIR=str(scratch))
    asking.join()
    assert finished.returncode == 75, finished.stderr
    assert "is left to the next one" in finished.stderr
    assert not (out / "hub_snapshot").exists()
    assert not list(scratch.glob("hf_vicreg_*"))  # nor copies of the weights elsewhere
    assert len(hub.repositories["writer/live"].commits) == 1
