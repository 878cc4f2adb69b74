"""Checkpoints on a real disk: complete or absent, and the same when they come back."""

import json
import sys

import pytest
import torch

from hf_vicreg.training.engine.checkpoint import (
    RunState,
    checkpoint_writer,
    copied,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    load_state,
    load_tensors,
    local_rng_states,
    remove_leftovers,
)
from hf_vicreg.training.errors import InputError


def trained(steps=3):
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder, step, keep=2):
    model, optimizer = trained()
    return checkpoint_writer(
        folder, RunState(step=step, recipe={"a": 1}), copied(model, optimizer), local_rng_states(0), keep
    )()


def test_everything_comes_back(tmp_path):
    path = save(tmp_path, 7)
    model, optimizer = trained()
    expected = torch.rand(3)
    checkpoint_writer(tmp_path, RunState(step=8), copied(model, optimizer), local_rng_states(0), 2)()
    following = torch.rand(3)

    other, other_optimizer = trained(steps=1)
    assert load_state(path).step == 7
    load_tensors(tmp_path / "step_00000008", other, other_optimizer, rank=0)
    assert torch.equal(torch.rand(3), following)
    assert not torch.equal(expected, following)
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    for model_, optimizer_ in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(1)
        model_(torch.randn(8, 4)).square().sum().backward()
        optimizer_.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_is_written_is_of_the_moment_of_the_copy(tmp_path):
    model, optimizer = trained()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    moments = [one.clone() for entry in optimizer.state.values() for one in (entry["exp_avg"], entry["exp_avg_sq"])]
    write = checkpoint_writer(tmp_path, RunState(step=3), copied(model, optimizer), local_rng_states(0), 2)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    path = write()
    other, other_optimizer = trained(steps=1)
    load_tensors(path, other, other_optimizer, rank=0)
    for name, one in other.state_dict().items():
        assert torch.equal(one, before[name])
        assert not torch.equal(one, model.state_dict()[name])
    found = [one for entry in other_optimizer.state.values() for one in (entry["exp_avg"], entry["exp_avg_sq"])]
    for one, two in zip(found, moments, strict=True):
        assert torch.equal(one, two)


def test_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000003", "step_00000010"]
    assert find_checkpoint(tmp_path, "latest").name == "step_00000010"
    assert find_checkpoint(tmp_path, "step_00000003").name == "step_00000003"
    assert find_checkpoint(tmp_path / "nothing", "latest") is None


@pytest.mark.parametrize(
    "damage", ["flipped-byte", "truncated", "missing-file", "no-manifest", "garbled-manifest", "empty-manifest"]
)
def test_damaged_checkpoints_are_passed_over(tmp_path, damage, caplog):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "flipped-byte":
        content[-3] ^= 1
        weights.write_bytes(content)
    elif damage == "truncated":
        weights.write_bytes(content[:-5])
    elif damage == "missing-file":
        weights.unlink()
    elif damage == "no-manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{" if damage == "garbled-manifest" else "{}")
    assert find_damage(newest)
    assert find_checkpoint(tmp_path, "latest").name == "step_00000001"
    assert "step_00000002 is damaged" in caplog.text
    with pytest.raises(InputError, match="is damaged"):
        find_checkpoint(tmp_path, "step_00000002")


def test_a_half_written_folder_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    stale = tmp_path / ".writing_step_00000002"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    assert find_checkpoint(tmp_path, "latest").name == "step_00000001"
    save(tmp_path, 2)  # a later attempt replaces it
    assert not stale.exists()
    assert find_damage(tmp_path / "step_00000002") is None


def test_what_a_kill_left_behind_is_removed_at_the_next_start(tmp_path):
    save(tmp_path, 1)
    for name in (".writing_step_00000002", ".removing_step_00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".writing_elsewhere").touch()  # not ours
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000001", ".writing_elsewhere"}
    remove_leftovers(tmp_path / "nothing")


def test_every_nth_is_kept_for_good(tmp_path):
    model, optimizer = trained(1)
    for step in range(5, 65, 5):
        state = RunState(step=step)
        checkpoint_writer(
            tmp_path, state, copied(model, optimizer), local_rng_states(0), keep=2, keep_every_steps=20
        )()
    assert [int(path.name.removeprefix("step_")) for path in list_checkpoints(tmp_path)] == [20, 40, 55, 60]


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_no_room_is_one_line_and_older_ones_stay(tmp_path):
    import resource

    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))  # no file may grow beyond so many bytes
    try:
        with pytest.raises(InputError) as caught:
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).startswith("`output_dir`: expected room to write in")
    assert "EFBIG (no space left); checkpoints written before are intact" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert find_damage(tmp_path / "step_00000001") is None


def test_the_scale_of_fp16_comes_back(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    model, optimizer = trained()
    for _ in range(4):
        scaler.scale(model(torch.randn(8, 4)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    path = checkpoint_writer(
        tmp_path, RunState(step=1, scaler=scaler.state_dict()), copied(model, optimizer), local_rng_states(0), 1
    )()
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(load_state(path).scaler)
    assert other.state_dict() == scaler.state_dict()
    assert other.get_scale() == 2048.0


def test_failing_to_write_leaves_older_ones(tmp_path):
    save(tmp_path, 1, keep=1)
    model, optimizer = trained()
    state = RunState(step=2, recipe={"not json": {1, 2}})
    with pytest.raises(TypeError):
        checkpoint_writer(tmp_path, state, copied(model, optimizer), local_rng_states(0), 1)()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert find_damage(tmp_path / "step_00000001") is None


@pytest.mark.parametrize(("keep", "left"), [(1, [7]), (2, [5, 7])])
def test_the_checkpoint_just_written_stays(tmp_path, keep, left):
    for step in (3, 5, 10, 15):
        save(tmp_path, step, keep=4)
    save(tmp_path, 7, keep=keep)  # after going back to an earlier one
    assert [int(path.name.removeprefix("step_")) for path in list_checkpoints(tmp_path)] == left


def test_checkpoint_of_another_version_is_named(tmp_path):
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"phase": 3}))
    with pytest.raises(InputError, match=r"written by another version .*'phase'"):
        load_state(path)


def test_a_checkpoint_says_which_order_its_run_has(tmp_path):
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    assert load_state(path).order == state["order"] == "keyed"
    (path / "state.json").write_text(json.dumps({key: one for key, one in state.items() if key != "order"}))
    assert load_state(path).order == "shuffled"  # what 0.1.0 had, and did not write down
    (path / "state.json").write_text(json.dumps(state | {"order": "by size"}))
    with pytest.raises(InputError, match=r"another version of this package \(its order of images is 'by size'"):
        load_state(path)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected 'latest' or a folder"):
        find_checkpoint(tmp_path, "step_00000009")


def test_no_pickles(tmp_path):
    files = {path.name for path in save(tmp_path, 1).iterdir()}
    assert files == {"manifest.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"}
    assert json.loads((tmp_path / "step_00000001" / "state.json").read_text())["step"] == 1
