"""Shards: every image once an epoch, resumed to the image, whoever reads them and whatever the network does."""

import json
import logging
import multiprocessing
import shutil
import sys
import tarfile
from collections import Counter
from itertools import islice, takewhile
from pathlib import Path

import fsspec
import pytest
import torch
import yaml

from hf_vicreg import pretrain
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.files import shard_stream
from hf_vicreg.training.images.files.shard_batches import shard_batches
from hf_vicreg.training.images.files.shard_stream import Lane, ShardStream, load_shards
from hf_vicreg.training.images.files.shards import ShardLost, list_shards, members
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.run.arguments import ViewsConfig
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.run.settings import explicit_settings

sys.path.append(str(Path(__file__).parent))
from shard_server import SIDE, coloured, number_of, served, write_shards

SHARDS, IN_A_SHARD = 6, 10
ALL = SHARDS * IN_A_SHARD


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch):
    """Three images ahead in each of six lanes, so that shards have several blocks."""
    monkeypatch.setattr(shard_stream, "BUFFER_SIZE", 18)


def still():
    """Samplers whose views are the image as it is."""
    config = ViewsConfig(crop_min_ratio=1.0, flip_probability=0.0)
    return ViewSampler.of_views(config, (SIDE, SIDE))


def batches_of(stream, count, *, cursors=None, workers=0, rank=0, processes=1, batch_size=12, samplers=None):
    settings = {"seed": 3, "num_batches": count, "batch_size": batch_size, "num_workers": workers}
    settings |= {"process_index": rank, "num_processes": processes, "pin_memory": False}
    return list(shard_batches(stream, samplers or still(), cursors=cursors or {}, **settings))


def numbers(batches):
    return [number_of(views) for batch in batches for views in batch["views"]]


def whole_epoch(stream, num_lanes):
    """Numbers of the images that all lanes give in their first epoch."""
    found = []
    for number in range(num_lanes):
        lane = Lane.at([number], stream, "3", num_lanes)
        found += [(shard, place) for _, shard, place, _ in takewhile(lambda one: one[0] == 0, lane.images())]
    return found


@pytest.mark.parametrize("num_lanes", [1, 5])
def test_every_image_comes_once_an_epoch(tmp_path, num_lanes):
    stream = load_shards(write_shards(tmp_path, SHARDS, IN_A_SHARD))
    found = whole_epoch(stream, num_lanes)
    assert sorted(found) == [(shard, place) for shard in range(SHARDS) for place in range(IN_A_SHARD)]
    assert found != sorted(found)


def test_batches_go_through_the_images_evenly_and_mix_shards(tmp_path):
    stream = load_shards(write_shards(tmp_path, SHARDS, IN_A_SHARD))
    batches = batches_of(stream, 10)  # two epochs
    counts = Counter(numbers(batches))
    assert counts == dict.fromkeys(range(ALL), 2)
    assert all(len({number // IN_A_SHARD for number in numbers([batch])}) >= 4 for batch in batches)
    assert numbers(batches[:5]) != numbers(batches[5:])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
def test_processes_and_workers_change_neither_order_nor_views(tmp_path):
    stream = load_shards(write_shards(tmp_path, SHARDS, IN_A_SHARD, broken=[17]))
    samplers = ViewSampler.of_views(ViewsConfig(), (SIDE, SIDE))
    whole = batches_of(stream, 6, samplers=samplers)
    for workers, processes in ((2, 1), (0, 2), (1, 3)):
        shares = [
            batches_of(stream, 6, samplers=samplers, workers=workers, rank=rank, processes=processes)
            for rank in range(processes)
        ]
        for step in range(6):
            parts = [share[step] for share in shares]
            for name in ("views", "colours"):
                assert torch.equal(torch.cat([part[name] for part in parts]), whole[step][name])
            merged = {number: cursor for part in parts for number, cursor in part["cursors"].items()}
            assert merged == whole[step]["cursors"]
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
@pytest.mark.parametrize("step", [4, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 7))])
def test_a_resumed_run_goes_on_with_the_next_image(tmp_path, step):
    stream = load_shards(write_shards(tmp_path, SHARDS, IN_A_SHARD, broken=[17, 40]))
    whole = batches_of(stream, 12)
    cursors = json.loads(json.dumps({str(lane): one for lane, one in whole[step - 1]["cursors"].items()}))
    cursors = {int(lane): one for lane, one in cursors.items()}
    rest = batches_of(stream, 12 - step, cursors=cursors, workers=2)
    assert numbers(rest) == numbers(whole[step:])
    halves = [batches_of(stream, 12 - step, cursors=cursors, rank=rank, processes=2) for rank in range(2)]
    assert [one for parts in zip(*halves, strict=True) for one in numbers(parts)] == numbers(whole[step:])


def test_a_store_that_drops_requests_loses_no_image(tmp_path):
    write_shards(tmp_path, SHARDS, IN_A_SHARD)
    with served(tmp_path, drop_every=3) as store:
        stream = load_shards(f"{store.address}/{{0000..{SHARDS - 1:04d}}}.tar")
        counts = Counter(numbers(batches_of(stream, 5, workers=2)))
        assert store.dropped >= 3
    assert counts == dict.fromkeys(range(ALL), 1)


@pytest.mark.slow
def test_two_thousand_shards_of_a_store_that_drops_requests(tmp_path):
    shards, images, steps = 2000, 4, 80
    write_shards(tmp_path, shards, images)
    with served(tmp_path, drop_every=20) as store:
        stream = load_shards(f"{store.address}/{{0000..{shards - 1:04d}}}.tar")
        first = batches_of(stream, steps // 2 - 1, batch_size=100, workers=2)
        # left within most shards, gone on with by two processes
        cursors = first[-1]["cursors"]
        halves = [
            batches_of(stream, steps // 2 + 1, cursors=cursors, batch_size=100, rank=rank, processes=2)
            for rank in range(2)
        ]
        assert store.dropped > 0.04 * store.requests.total()
    counts = Counter(numbers(first) + [one for half in halves for one in numbers(half)])
    assert counts == dict.fromkeys(range(shards * images), 1)


def test_broken_images_are_replaced_and_named(tmp_path):
    stream = load_shards(write_shards(tmp_path, SHARDS, IN_A_SHARD, broken=[17, 40]))
    batches = batches_of(stream, 10)
    unusable = sorted({index for batch in batches for index in batch["unusable"]})
    assert [stream.describe(index) for index in unusable] == ["0001.tar, image 8", "0004.tar, image 1"]
    assert {stream.refusal(index).kind for index in unusable} == {"not an image"}
    assert all(len(batch["views"]) == 12 for batch in batches)


@pytest.mark.parametrize("fault", ["cut", "header", "gone", "zeros"])
def test_a_shard_that_dies_is_given_up_and_counted(tmp_path, caplog, fault):
    stream = load_shards(write_shards(tmp_path, SHARDS, IN_A_SHARD))
    path = tmp_path / "0002.tar"
    content = bytearray(path.read_bytes())
    middle = [one.offset for one in members(str(path))][6]
    if fault == "cut":
        path.write_bytes(content[: middle + 540])
    elif fault == "gone":
        path.unlink()
    else:
        content[middle : middle + 512] = b"x" * 512
        path.write_bytes(content if fault == "header" else b"\1" * 2000)
    batches = batches_of(stream, 10)
    left = {"cut": 6, "header": 6, "gone": 0, "zeros": 0}[fault]
    counts = Counter(numbers(batches))
    assert counts.keys() == set(range(ALL)) - set(range(20 + left, 30))
    (lost,) = {index for batch in batches for index in batch["unusable"]}
    assert stream.describe(lost) == "0002.tar, from some byte on"
    assert stream.refusal(lost).kind == {"cut": "truncated", "gone": "missing"}.get(fault, "damaged")
    assert "shard 0002.tar is given up: " in caplog.text


def test_what_was_read_ahead_of_a_fault_comes_in_the_same_order_when_resumed(tmp_path):
    stream = load_shards(write_shards(tmp_path, 1, 10))
    path = tmp_path / "0000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: [one.offset for one in members(str(path))][7] + 540])

    def places(lane, count):
        return [place for _, _, place, _ in islice(lane.images(), count)]

    lane = Lane.at([0], stream, "3", 1)
    assert sorted(places(lane, 7)) == list(range(7))
    for given in range(1, 7):
        lane = Lane.at([0], stream, "3", 1)
        before = places(lane, given)
        path.write_bytes(whole)  # the store is back
        after = places(Lane.at(lane.cursor, stream, "3", 1), 10 - given)
        path.write_bytes(whole[: [one.offset for one in members(str(path))][7] + 540])
        assert before + after[: 7 - given] == places(Lane.at([0], stream, "3", 1), 7)
        assert sorted(after[7 - given :]) == [7, 8, 9]


def test_nothing_to_read_ends_the_run_in_a_line(tmp_path):
    pattern = write_shards(tmp_path, 3, 4)
    stream = load_shards(pattern)
    for shard in range(3):
        (tmp_path / f"{shard:04d}.tar").unlink()
    (batch,) = batches_of(stream, 1, batch_size=3)
    assert batch["views"] is None
    with pytest.raises(InputError, match=r"found none: 0002.tar: missing file \(FileNotFoundError 2\)") as caught:
        load_shards(pattern)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shards", "batch_size", "lanes"), [(3, 6, 3), (2000, 256, 128), (2000, 100, 100), (50, 96, 48)]
)
def test_lanes_are_what_many_numbers_of_processes_can_share(shards, batch_size, lanes):
    stream = ShardStream("x", ["0.tar"] * shards, "")
    assert stream.num_lanes(batch_size) == lanes
    stream.refuse_processes(batch_size, lanes)
    with pytest.raises(InputError, match=f"the {lanes} lanes .* by 7 processes; take a number of them that divides"):
        stream.refuse_processes(batch_size, 7)


def test_patterns_name_shards_in_order(tmp_path):
    assert list_shards("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert list_shards("s3://b/{x,y}-{9..10}.tar") == [f"s3://b/{one}.tar" for one in ("x-9", "x-10", "y-9", "y-10")]
    write_shards(tmp_path, 3, 1)
    assert list_shards(f"{tmp_path}/*.tar") == [f"{tmp_path}/000{shard}.tar" for shard in range(3)]
    for pattern, message in (
        (f"{tmp_path}/no*.tar", "expected shards, found none by"),
        ("{9..1}.tar", "with FIRST before LAST, got {9..1}"),
        ("{0..999}{0..9999}.tar", "expected at most 1,000,000 shards, got 10,000,000"),
        ("nowhere://x/*.tar", "nothing installed reads nowhere://"),
    ):
        with pytest.raises(InputError, match=message):
            list_shards(pattern)
    with pytest.raises(InputError, match="nothing installed reads nowhere://"):
        load_shards("nowhere://x/0.tar")


def test_a_store_that_wants_credentials_is_one_line_without_them(tmp_path, monkeypatch):
    write_shards(tmp_path, 2, 2)
    with served(tmp_path, secret="Basic Z3Vlc3Q6aHVzaA==") as store:
        pattern = f"{store.address}/{{0000..0001}}.tar"
        with pytest.raises(InputError, match=r"refuses to be read .*; give credentials to the store's own") as caught:
            load_shards(pattern)
        assert "\n" not in str(caught.value)
        headers = {"Authorization": "Basic Z3Vlc3Q6aHVzaA=="}
        monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"headers": headers}})
        assert load_shards(pattern).num_shards == 2
    for address in ("http://guest:hush@store/0.tar", "http://store/0.tar?signature=hush", "s3://store/0.tar#hush"):
        settings = {"output_dir": "out", "dataset_name": address, "streaming": True, "max_steps": 5}
        with pytest.raises(InputError, match="without credentials, it holds some") as caught:
            resolve(settings)
        assert "hush" not in str(caught.value)


def test_tars_are_named_as_other_images_are(tmp_path):
    pattern = write_shards(tmp_path, 2, 2)
    found = explicit_settings({"data": pattern, "output_dir": "out", "max_steps": 5})
    assert (found["dataset_name"], found["streaming"]) == (pattern, True)
    settings = {"output_dir": "out", "dataset_name": pattern, "max_steps": 5}
    for changes, message in (
        ({}, "`streaming`: expected it with shards"),
        ({"dataset_name": None, "train_dir": pattern}, "`train_dir`: expected a folder of images, got shards"),
        ({"streaming": True, "image_column_name": "image"}, "`image_column_name`: expected none with tars"),
        ({"streaming": True, "max_steps": None}, "`max_steps`: expected a number of steps"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(settings | changes)


def test_a_run_over_shards_is_killed_and_resumed_to_the_bit(tmp_path, tiny_recipe, caplog):
    pattern = write_shards(tmp_path / "shards", 4, 10, broken=[5])
    settings = tiny_recipe | {"batch_size": 8, "max_steps": 9, "checkpointing_steps": 4}
    with caplog.at_level(logging.INFO, logger="hf_vicreg"):
        result = pretrain(out=tmp_path / "whole", data=pattern, **settings)
    assert "4 shards" in caplog.text
    assert result.results["hub_dataset"] is None
    assert result.results["unusable_images"] == 1
    (named,) = [json.loads(line) for line in (tmp_path / "whole" / "unusable.jsonl").read_text().splitlines()]
    assert named["name"] == "0000.tar, image 6"
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000009")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "again" / name).unlink()
    pretrain(out=tmp_path / "again", data=pattern, resume_from_checkpoint="latest", **settings)
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "again")]
    assert weights[0] == weights[1]
    write_shards(tmp_path / "shards", 5, 10)
    longer = pattern.replace("0003", "0004")
    with pytest.raises(InputError, match="the images are not the ones it was trained on") as caught:
        pretrain(out=tmp_path / "again", data=longer, resume_from_checkpoint="latest", **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_begin_a_run_and_one_goes_on(tmp_path, tiny_recipe, ranks):
    pattern = write_shards(tmp_path / "shards", 4, 10, broken=[5, 22])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe | {"batch_size": 8, "checkpointing_steps": 3}))
    command = ["-m", "hf_vicreg.cli", "pretrain", pattern, "--config", tmp_path / "recipe.yaml", "--max_steps", 8]
    command += ["--dataloader_num_workers", 1, "--output_dir"]

    def state(folder):
        found = json.loads((tmp_path / folder / "checkpoints" / "step_00000008" / "state.json").read_text())
        return found["cursors"], found["unusable"]

    for count, folder in ((1, "one"), (2, "two")):
        done = ranks(count, *command, tmp_path / folder)
        assert done.returncode == 0, done.stderr
    assert len(state("one")[0]) == 4
    assert state("two") == state("one")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step_00000008")
    (tmp_path / "two" / "model.safetensors").unlink()
    done = ranks(1, *command, tmp_path / "two", "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert state("two") == state("one")
    done = ranks(3, *command, tmp_path / "three", "--batch_size", 12)
    assert done.returncode == 2
    assert done.stderr.count("the 4 lanes that 4 shards and a batch of 12 give to be shared by 3 processes") >= 1
    assert not (tmp_path / "three").exists()


def test_a_tar_is_read_on_from_any_image(tmp_path):
    write_shards(tmp_path, 1, 5)
    name = str(tmp_path / "0000.tar")
    found = list(members(name))
    assert [one.content for one in found] == [coloured(number) for number in range(5)]
    for place, one in enumerate(found):
        assert list(members(name, one.offset)) == found[place:]
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    assert list(members(str(tmp_path / "none.tar"))) == []
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(ShardLost):
        list(members(str(tmp_path / "empty.tar")))
    assert ShardStream("x", [name], "").num_lanes(7) == 1
