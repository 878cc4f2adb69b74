"""A stream of parquet shards: every image once a pass, shared out, and what is given up is said."""

import json
import logging
import multiprocessing
import shutil
from io import BytesIO
from itertools import islice

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_vicreg import pretrain
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.decoding import KINDS
from hf_vicreg.training.images.sources import load_sources
from hf_vicreg.training.images.streaming import ImageStream, StreamDataset, load_stream, stream_batches
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.run.arguments import ViewsConfig
from hf_vicreg.training.run.resolve import resolve

SHARDS, IN_A_SHARD = 4, 12


@pytest.fixture
def shards(tmp_path):
    """A folder of parquet shards: 48 images of one colour each, two of them broken, one missing."""
    folder = tmp_path / "shards"
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for shard in range(SHARDS):
        rows = []
        for number in range(shard * IN_A_SHARD, (shard + 1) * IN_A_SHARD):
            buffer = BytesIO()
            Image.new("RGB", (20, 20), (number * 5, 0, 0)).save(buffer, "PNG")
            content = {3: b"broken", 30: b"cut", 40: None}.get(number, buffer.getvalue())
            rows.append(None if content is None else {"bytes": content, "path": None})
        table = datasets.Dataset.from_dict({"image": rows, "label": [0] * IN_A_SHARD}, features=features)
        table.to_parquet(folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet")
    return folder


def still():
    """Samplers whose views are the image as it is."""
    config = ViewsConfig(crop_min_ratio=1.0, flip_probability=0.0)
    return ViewSampler.of_views(config, (20, 20))


def colours_of(batches):
    """Which of the one-colour images were seen, by number."""
    return [int(view[0, 0, 0, 0]) // 5 for batch in batches for view in batch["views"]]


WHOLE = sorted(set(range(SHARDS * IN_A_SHARD)) - {3, 30, 40})


def test_folders_of_shards_are_read_without_streaming_too(shards):
    source, _ = load_sources(dataset_name=str(shards))
    assert len(source) == SHARDS * IN_A_SHARD
    assert [index for index in range(len(source)) if source.read(index) is None] == [3, 30, 40]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_share_each_pass_out(shards, num_processes):
    stream = load_stream(str(shards))
    assert stream.num_shards == SHARDS
    parts = [
        list(StreamDataset(stream, still(), "key", rank, num_processes)._pass(0)) for rank in range(num_processes)
    ]
    assert sum(map(len, parts)) == SHARDS * IN_A_SHARD
    assert len({content for part in parts for content in part}) == SHARDS * IN_A_SHARD


def test_passes_and_keys_differ_and_are_repeatable(shards):
    stream = load_stream(str(shards))

    def order(key, epoch):
        return list(StreamDataset(stream, still(), key, 0, 1)._pass(epoch))

    assert order("0/0", 0) == order("0/0", 0)
    assert order("0/0", 0) != order("0/0", 1)
    assert order("0/0", 0) != order("0/5", 0)


def test_every_image_comes_once_a_pass_and_broken_ones_are_named(shards):
    stream = load_stream(str(shards))
    samples = list(islice(StreamDataset(stream, still(), "key", 0, 1), 2 * len(WHOLE)))
    seen = [int(sample["views"][0, 0, 0, 0]) // 5 for sample in samples]
    assert sorted(seen[: len(WHOLE)]) == sorted(seen[len(WHOLE) :]) == WHOLE
    assert len({index for sample in samples for index in sample["unusable"]}) == 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
def test_workers_share_the_shards_and_spare_ones_do_no_harm(shards):
    stream = load_stream(str(shards))
    settings = {"seed": 0, "first_step": 0, "process_index": 0, "num_processes": 1, "pin_memory": False}
    batches = list(stream_batches(stream, still(), num_batches=9, batch_size=5, num_workers=3, **settings))
    assert len(batches) == 9
    assert all(batch["views"].shape == (5, 2, 3, 20, 20) for batch in batches)
    assert len(set(colours_of(batches))) >= 30
    again = list(stream_batches(stream, still(), num_batches=9, batch_size=5, num_workers=3, **settings))
    assert colours_of(again) == colours_of(batches)
    # one shard a worker at most, though more were asked for
    spare = list(stream_batches(stream, still(), num_batches=2, batch_size=5, num_workers=6, **settings))
    assert len(spare) == 2


def test_nothing_usable_ends_the_run(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [{"bytes": b"broken", "path": None}] * 3}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    stream = load_stream(str(tmp_path / "set"))
    sample = next(iter(StreamDataset(stream, still(), "key", 0, 1)))
    assert sample["views"] is None
    assert len(sample["unusable"]) == 64
    datasets.Dataset.from_dict({"image": []}, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    settings = {"seed": 0, "first_step": 0, "process_index": 0, "num_processes": 1, "pin_memory": False}
    with pytest.raises(InputError, match="process 0 got none"):
        list(
            stream_batches(
                load_stream(str(tmp_path / "set")), still(), num_batches=1, batch_size=2, num_workers=0, **settings
            )
        )


def test_a_broken_shard_is_one_line_and_a_lost_image_is_one_less(shards, caplog):
    settings = {"seed": 0, "first_step": 0, "process_index": 0, "num_processes": 1, "pin_memory": False}
    settings |= {"num_batches": 30, "batch_size": 4}
    path = shards / "train-00002-of-00004.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    for workers in (0, 2):
        with pytest.raises(InputError, match="`dataset_name`: expected shards that can be read in shards: ") as caught:
            list(stream_batches(load_stream(str(shards)), still(), num_workers=workers, **settings))
        assert "\n" not in str(caught.value)
        assert "process 0: `dataset_name`" in caplog.text
        # they outlive the signal by which an interpreter that exits ends them, and it would wait for them
        assert not multiprocessing.active_children()
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = [{"bytes": None, "path": "no-such-protocol://x"}, {"bytes": None, "path": "no-such-file"}]
    stream = ImageStream(
        "rows", datasets.Dataset.from_dict({"image": rows}, features=features).to_iterable_dataset(), "image"
    )
    assert next(iter(StreamDataset(stream, still(), "key", 0, 1)))["views"] is None


def test_other_images_have_another_fingerprint(shards, tmp_path):
    before = load_stream(str(shards)).fingerprint
    assert load_stream(str(shards)).fingerprint == before
    buffer = BytesIO()
    Image.new("RGB", (20, 20), (1, 2, 3)).save(buffer, "PNG")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": buffer.getvalue(), "path": None}] * IN_A_SHARD, "label": [0] * IN_A_SHARD}
    path = shards / "train-00000-of-00004.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    assert load_stream(str(shards)).fingerprint != before


def test_a_streamed_run_trains_and_says_what_resuming_means(shards, tmp_path, tiny_recipe, caplog):
    settings = tiny_recipe | {"batch_size": 16, "streaming": True, "max_steps": 9, "checkpointing_steps": 3}
    with caplog.at_level(logging.INFO, logger="hf_vicreg"):
        result = pretrain(out=tmp_path / "run", data=shards, **settings)
    assert "4 shards" in caplog.text
    assert result.results["steps"] == 9
    assert result.results["unusable_images"] == 3  # each counted once, though the stream was passed three times
    assert result.results["num_images"] == 144
    passed_over = [json.loads(line) for line in (tmp_path / "run" / "unusable.jsonl").read_text().splitlines()]
    assert len(passed_over) == 3
    # a stream cannot be read again by index: the kind travels in the number
    assert all(one["reason"] in KINDS.values() for one in passed_over)
    assert all(one["name"].startswith("the image whose SHA-256 begins with ") for one in passed_over)
    assert {len(one["name"].split()[-1]) for one in passed_over} == {12}
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert np.isfinite([line["loss"] for line in lines]).all()

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000009")
    again = pretrain(out=tmp_path / "run", data=shards, resume_from_checkpoint="latest", **settings)
    assert again.results["steps"] == 9
    assert "goes on in a new order" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": None}, "`max_steps`: expected a number of steps"),
        ({"dataset_name": "digits"}, "`streaming`: expected a dataset to stream"),
        ({"dataset_name": None, "train_dir": "folder"}, "`streaming`: expected a dataset to stream"),
        ({"max_train_samples": 5}, "`max_train_samples`: expected none with --streaming"),
        ({"test_split": "test"}, "`test_split`: expected none with --streaming"),
        ({"streaming": "perhaps"}, "`streaming`: expected bool, got 'perhaps'"),
    ],
    ids=["steps", "digits", "folder", "samples", "split", "type"],
)
def test_what_a_stream_cannot_do_is_said(changes, message):
    settings = {"output_dir": "out", "dataset_name": "some/images", "streaming": True, "max_steps": 5}
    with pytest.raises(InputError, match=message):
        resolve(settings | changes)


def test_data_that_cannot_be_streamed_is_named(shards, tmp_path):
    datasets.Dataset.from_dict({"image": [1]}).save_to_disk(tmp_path / "saved")
    for name, message in ((tmp_path / "saved", "is read without it"), (tmp_path / "none", "does not exist")):
        with pytest.raises(InputError, match=message):
            load_stream(str(name))
    with pytest.raises(InputError, match=r"`train_split`: expected one of \['train'\]"):
        load_stream(str(shards), train_split="dev")
