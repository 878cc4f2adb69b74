"""Streams of images of any channels and depth: read as they are, measured before, trained on, gone on with."""

import io
import json
import tarfile
from io import BytesIO

import datasets
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from hf_vicreg import pretrain
from hf_vicreg.cli import main
from hf_vicreg.training.errors import RunStopped
from hf_vicreg.training.images.channels.channel_source import as_channels
from hf_vicreg.training.images.files.shard_batches import shard_batches
from hf_vicreg.training.images.files.shard_stream import load_shards
from hf_vicreg.training.images.order import alike
from hf_vicreg.training.images.streaming import SAMPLED_SHARDS, load_stream, stream_batches
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.run.arguments import ViewsConfig
from hf_vicreg.training.tasks.captioning.data import collate

SHARDS, IN_A_SHARD, SIDE = 4, 6, 24
ALL = SHARDS * IN_A_SHARD
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SHAPE |= {"image_size": 16, "patch_size": 8}
FLAGS = {"vicreg": {"expander_sizes": [16, 16]}, "batch_size": 4, "device": "cpu", "streaming": True}
KINDS = [(1, "png"), (5, "tif")]
FORMS = ["tars", "tables", "dataset"]


def pixels_of(number, channels, dtype=np.uint16):
    """Noise around ten times the number, other channels brighter, `(height, width, channels)`."""
    noise = np.random.default_rng(number).integers(300, 900, (SIDE, SIDE, channels)) + 1000 * np.arange(channels)
    noise[0, 0] = 10 * number
    return noise.astype(dtype)


def encoded(pixels, suffix):
    buffer = BytesIO()
    if suffix == "npy":
        np.save(buffer, pixels)
    elif suffix == "tif":
        tifffile.imwrite(buffer, pixels.transpose(2, 0, 1), photometric="minisblack")
    else:
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, form, files):
    """Shards of (suffix, content), and what names them."""
    folder.mkdir()
    for shard in range(SHARDS):
        some = files[shard * IN_A_SHARD : (shard + 1) * IN_A_SHARD]
        if form == "tars":
            with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
                for number, (suffix, content) in enumerate(some):
                    info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        else:
            rows = {"image": [{"bytes": content, "path": None} for _, content in some]}
            table = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
            table.to_parquet(folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet")
    return {"tars": f"{folder}/*.tar", "tables": f"{folder}/*.parquet", "dataset": str(folder)}[form]


@pytest.fixture(params=KINDS, ids=["1x16", "5x16"])
def images(request):
    """Channels and files of 24 images."""
    channels, suffix = request.param
    return channels, [(suffix, encoded(pixels_of(number, channels), suffix)) for number in range(ALL)]


def still():
    """Samplers whose views are the image as it is."""
    return ViewSampler.of_views(ViewsConfig(crop_min_ratio=1.0, flip_probability=0.0), (SIDE, SIDE))


def opened(place, form, channels):
    return load_stream(place).with_channels(channels, None) if form == "dataset" else load_shards(place, "", channels)


def batches_of(stream, form, count, workers=0):
    shared = {"seed": 0, "num_batches": count, "num_workers": workers, "process_index": 0, "num_processes": 1}
    shared |= {"batch_size": 4, "pin_memory": False}
    if form == "dataset":
        return list(stream_batches(stream, still(), first_step=0, **shared))
    return list(shard_batches(stream, still(), cursors={}, **shared))


@pytest.mark.parametrize("form", FORMS)
def test_every_image_comes_once_in_its_own_depth(images, form, tmp_path):
    channels, files = images
    stream = opened(write(tmp_path / "shards", form, files), form, channels)
    views = [view[0] for batch in batches_of(stream, form, ALL // 4) for view in batch["views"]]
    assert {view.dtype for view in views} == {torch.uint16}
    numbers = [int(view[0, 0, 0]) // 10 for view in views]
    assert sorted(numbers) == list(range(ALL))
    for number, view in zip(numbers, views, strict=True):
        assert np.array_equal(view.numpy().transpose(1, 2, 0), pixels_of(number, channels))


@pytest.mark.parametrize("form", FORMS)
def test_a_run_measures_trains_and_leaves_what_reads_a_file(images, form, tmp_path):
    channels, files = images
    place = write(tmp_path / "shards", form, files)
    run = pretrain(out=tmp_path / "run", data=place, model=SHAPE | {"num_channels": channels}, max_steps=3, **FLAGS)
    assert not (tmp_path / "run" / "unusable.jsonl").exists()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    values = np.concatenate([pixels_of(number, channels).reshape(-1, channels) for number in range(ALL)])
    low, high = np.percentile(values, (0.5, 99.5), axis=0)  # all of the few are looked at
    np.testing.assert_allclose(processor.channel_low, low)
    np.testing.assert_allclose(processor.channel_high, high)
    np.testing.assert_allclose(processor.image_mean, ((values - low) / (high - low)).clip(0, 1).mean(0), rtol=1e-6)
    suffix, content = files[7]
    (tmp_path / f"7.{suffix}").write_bytes(content)
    inputs = processor(str(tmp_path / f"7.{suffix}"), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, channels, 16, 16)
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path / "run").eval()(**inputs).pooler_output
        torch.testing.assert_close(found, run.encoder.cpu().eval()(**inputs).pooler_output)


@pytest.mark.parametrize("images", KINDS[1:], indirect=True, ids=["5x16"])
def test_a_resumed_run_goes_on_with_the_next_image_and_what_was_measured(images, tmp_path):
    channels, files = images
    place = write(tmp_path / "shards", "tars", files)
    flags = FLAGS | {"data": place, "model": SHAPE | {"num_channels": channels}, "checkpointing_steps": 2}
    whole = pretrain(out=tmp_path / "whole", max_steps=4, **flags)
    with pytest.raises(RunStopped):
        pretrain(out=tmp_path / "half", max_steps=4, max_time=1e-6, **flags)
    resumed = pretrain(out=tmp_path / "half", max_steps=4, resume_from_checkpoint="latest", **flags)
    assert resumed.processor.to_dict() == whole.processor.to_dict()
    for one, other in zip(resumed.encoder.parameters(), whole.encoder.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_images_of_other_channels_are_replaced_and_named(form, tmp_path):
    files = [("tif", encoded(pixels_of(number, 5), "tif")) for number in range(ALL)]
    files[9] = ("png", encoded(pixels_of(9, 3, np.uint8), "png"))
    place = write(tmp_path / "shards", form, files)
    pretrain(out=tmp_path / "run", data=place, model=SHAPE | {"num_channels": 5}, max_steps=6, **FLAGS)
    entries = [json.loads(line) for line in (tmp_path / "run" / "unusable.jsonl").read_text().splitlines()]
    assert {entry["kind"] for entry in entries} == {"channels"}
    assert len(entries) == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_of_other_channels_is_refused_in_one_line(form, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = write(tmp_path / "shards", form, [("tif", encoded(pixels_of(one, 5), "tif")) for one in range(ALL)])
    flags = ["--model.num_channels", "2", "--streaming", "--max_steps", "2", "--output_dir", "run"]
    assert main(["pretrain", "--dataset_name", place, *flags]) == 2
    assert "where 2 are wanted; train with --model.num_channels 5" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    write(tmp_path / "none", "dataset", [("png", b"")] * ALL)
    assert main(["pretrain", "--dataset_name", "none", *flags]) == 2
    assert "`normalisation`: expected images to measure in none" in capsys.readouterr().err


def test_three_channels_of_16_bits_keep_them_where_they_are_measured(tmp_path):
    files = [("tif", encoded(pixels_of(number, 3), "tif")) for number in range(ALL)]
    place = write(tmp_path / "shards", "tars", files)
    run = pretrain(
        out=tmp_path / "run", data=place, model=SHAPE, normalisation=["fixed", "0", "4000"], max_steps=2, **FLAGS
    )
    assert list(run.processor.channel_high) == [4000.0] * 3


def test_arrays_in_tars_are_images_of_channels_alone(tmp_path):
    files = [("npy" if one % 2 else "tif", pixels_of(one, 5)) for one in range(ALL)]
    place = write(tmp_path / "shards", "tars", [(suffix, encoded(one, suffix)) for suffix, one in files])
    assert len(list(load_shards(place, "", 5).members_of(0))) == IN_A_SHARD
    assert len(list(load_shards(place).members_of(0))) == IN_A_SHARD // 2
    views = [view for batch in batches_of(load_shards(place, "", 5), "tars", ALL // 4) for view in batch["views"]]
    assert sorted(int(view[0, 0, 0, 0]) // 10 for view in views) == list(range(ALL))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
@pytest.mark.parametrize("workers", [0, 2])
def test_depths_may_differ_from_image_to_image(workers, tmp_path):
    # of two shards each: a loader process may have images of one depth, and the other one of another
    kinds = [np.uint16, np.uint16, np.uint8, np.uint8]
    files = [pixels_of(one, 2, np.int64).clip(0, 255).astype(kinds[one // IN_A_SHARD]) for one in range(ALL)]
    place = write(tmp_path / "shards", "tars", [("tif", encoded(one, "tif")) for one in files])
    batches = batches_of(load_shards(place, "", 2), "tars", 6 * ALL // 4, workers)
    for batch in batches:
        assert batch["views"].dtype == torch.float32  # both depths are in each
        assert batch["views"].shape == (4, 2, 2, SIDE, SIDE)
    numbers = [int(view[0, 0, 0, 0]) for batch in batches for view in batch["views"]]
    assert max(numbers) == 10 * (ALL - 1)


def test_crops_of_two_depths_make_a_batch():
    deep, shallow = (torch.full((2, 4, 4), 200, dtype=one) for one in (torch.uint16, torch.uint8))
    samples = [{"crop": one, "colours": torch.zeros(7), "labels": torch.tensor([1])} for one in (deep, shallow)]
    assert collate(samples)["crops"].dtype == torch.float32
    assert collate(samples)["crops"].eq(200).all()
    assert alike([deep, deep])[0] is deep


def test_what_is_measured_is_spread_over_the_shards_and_has_an_end(images, tmp_path, monkeypatch):
    channels, files = images
    tables, tars = (opened(write(tmp_path / form, form, files), form, channels) for form in ("dataset", "tars"))
    for stream in (tables, tars):
        sample = as_channels(stream.sample(), channels)
        numbers = [int(np.asarray(sample.read(index))[0, 0, 0]) // 10 for index in range(len(sample))]
        assert numbers == list(range(ALL))  # fewer than would be looked at
    monkeypatch.setattr("hf_vicreg.training.images.streaming.NUM_SAMPLED", 8)
    for stream in (tables, tars):
        assert [stream.sample().read_bytes(index) for index in (0, 1, 2)] == [files[one][1] for one in (0, 1, 6)]
    monkeypatch.setattr("hf_vicreg.training.images.streaming.SAMPLED_BYTES", 1)
    assert len(tars.sample()) == 1
    assert SAMPLED_SHARDS >= SHARDS
