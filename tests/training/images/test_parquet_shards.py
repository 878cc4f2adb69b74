"""Parquet shards: every image once an epoch, read on from any row, over a store that drops requests."""

import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from hf_vicreg import pretrain
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.files import shard_stream
from hf_vicreg.training.images.files.parquet_shards import SeekableShard, parquet_members
from hf_vicreg.training.images.files.shard_batches import shard_batches
from hf_vicreg.training.images.files.shard_stream import load_shards
from hf_vicreg.training.images.files.shards import ShardLost
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.run.arguments import ViewsConfig

sys.path.append(str(Path(__file__).parent))
from shard_server import SIDE, coloured, number_of, served

SHARDS, ROWS, GROUP = 4, 11, 3


def table_of(contents, **others):
    images = pyarrow.array([{"bytes": one, "path": None} for one in contents])
    return pyarrow.table({"image": images, **others})


def write_shards(folder):
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        contents = [coloured(shard * ROWS + row) for row in range(ROWS)]
        table = table_of(contents, label=pyarrow.array(range(ROWS)))
        pyarrow.parquet.write_table(table, folder / f"{shard:04d}.parquet", row_group_size=GROUP)
    return f"{folder}/{{0000..{SHARDS - 1:04d}}}.parquet"


def batches_of(stream, count, cursors=None, workers=0):
    samplers = ViewSampler.of_views(ViewsConfig(crop_min_ratio=1.0, flip_probability=0.0), (SIDE, SIDE))
    settings = {"seed": 3, "num_batches": count, "batch_size": 4, "num_workers": workers}
    settings |= {"process_index": 0, "num_processes": 1, "pin_memory": False}
    return list(shard_batches(stream, samplers, cursors=cursors or {}, **settings))


def numbers(batches):
    return [number_of(views) for batch in batches for views in batch["views"]]


def test_a_table_is_read_on_from_any_row(tmp_path):
    write_shards(tmp_path)
    name = str(tmp_path / "0001.parquet")
    found = list(parquet_members(name))
    assert [(one.offset, one.content) for one in found] == [(row, coloured(ROWS + row)) for row in range(ROWS)]
    for row in range(ROWS + 2):
        assert list(parquet_members(name, row)) == found[row:]


def test_what_datasets_writes_and_plain_bytes_are_read_and_missing_ones_are_empty(tmp_path):
    images = [Image.new("RGB", (5, 4), (10 * one, 0, 0)) for one in range(3)]
    rows = datasets.Dataset.from_dict({"label": [0, 1, 2], "picture": images})
    rows.cast_column("picture", datasets.Image()).to_parquet(tmp_path / "own.parquet")
    found = [one.content for one in parquet_members(str(tmp_path / "own.parquet"))]
    stored = rows.cast_column("picture", datasets.Image(decode=False))
    assert found == [one["bytes"] for one in stored["picture"]]
    plain = pyarrow.table({"image": pyarrow.array([b"1", None, b"3"], pyarrow.large_binary()), "mask": [b"x"] * 3})
    pyarrow.parquet.write_table(plain, tmp_path / "plain.parquet")
    assert [one.content for one in parquet_members(str(tmp_path / "plain.parquet"))] == [b"1", b"", b"3"]
    assert [one.content for one in parquet_members(str(tmp_path / "plain.parquet"), 1, "mask")] == [b"x", b"x"]


def test_every_image_comes_once_an_epoch_though_a_store_drops_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_stream, "BUFFER_SIZE", 16)  # four images ahead in a lane: several blocks a shard
    write_shards(tmp_path)
    with served(tmp_path, drop_every=4) as store:
        stream = load_shards(f"{store.address}/{{0000..{SHARDS - 1:04d}}}.parquet")
        whole = batches_of(stream, 2 * ROWS)
        assert store.dropped >= 3
        counts = Counter(numbers(whole))
        assert counts == dict.fromkeys(range(SHARDS * ROWS), 2)
        rest = batches_of(stream, 2 * ROWS - 5, cursors=whole[4]["cursors"])  # within every shard
        assert numbers(rest) == numbers(whole[5:])
    local = load_shards(f"{tmp_path}/*.parquet")
    assert numbers(batches_of(local, 3)) == numbers(whole[:3])


def test_a_table_that_is_cut_or_gone_is_given_up_and_counted(tmp_path, caplog):
    pattern = write_shards(tmp_path)
    stream = load_shards(pattern)
    content = (tmp_path / "0001.parquet").read_bytes()
    (tmp_path / "0001.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "0002.parquet").unlink()
    with pytest.raises(ShardLost, match="Parquet magic bytes not found"):
        next(parquet_members(str(tmp_path / "0001.parquet")))
    batches = batches_of(stream, 2 * ROWS)
    assert set(numbers(batches)) == {*range(ROWS), *range(3 * ROWS, 4 * ROWS)}
    lost = {stream.describe(index): stream.refusal(index).kind for one in batches for index in one["unusable"]}
    assert lost == {"0001.parquet, from some byte on": "damaged", "0002.parquet, from some byte on": "missing"}
    assert "shard 0001.parquet is given up: damaged" in caplog.text


def test_the_column_is_named_where_it_cannot_be_told(tmp_path):
    two = pyarrow.table({"left": [b"1"], "right": [b"2"], "label": [0]})
    pyarrow.parquet.write_table(two, tmp_path / "two.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"label": [0]}), tmp_path / "none.parquet")
    assert load_shards(str(tmp_path / "two.parquet"), "left").column == "left"
    for name, column, found in (
        ("two", "", r"found \['left', 'right'\] among \['left', 'right', 'label'\]"),
        ("two", "up", r"called 'up' in two.parquet, found \['left', 'right'\]"),
        ("none", "", r"in none.parquet, found \[\] among \['label'\]"),
    ):
        with pytest.raises(InputError, match=f"`image_column_name`: expected a column of image files' bytes.*{found}"):
            load_shards(str(tmp_path / f"{name}.parquet"), column)


def test_a_shard_is_a_file_that_jumps(tmp_path):
    (tmp_path / "bytes").write_bytes(bytes(range(100)))
    file = SeekableShard(str(tmp_path / "bytes"))
    assert (file.size, file.tell()) == (100, 0)
    assert file.seek(-10, 2) == 90
    assert file.read(20) == bytes(range(90, 100))
    assert file.seek(3) == 3
    assert file.seek(2, 1) == 5
    assert (file.read(2), file.tell(), len(file.read())) == (bytes([5, 6]), 7, 93)
    file.close()


def test_a_run_over_tables_begins(tmp_path, tiny_recipe):
    pattern = write_shards(tmp_path / "shards")
    result = pretrain(out=tmp_path / "run", data=pattern, **tiny_recipe | {"batch_size": 8, "max_steps": 3})
    assert result.results["steps"] == 3
    assert result.results["num_images"] == 24
