"""Huge images: windows as images, crops that read the tiles they touch, blank windows left out."""

import random

import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image
from torch.utils.data import DataLoader

from hf_vicreg import pretrain
from hf_vicreg.modeling.channel_files import open_channels
from hf_vicreg.modeling.channel_layout import ChannelFile
from hf_vicreg.training.errors import InputError, RunStopped
from hf_vicreg.training.images.channels import channel_source
from hf_vicreg.training.images.channels.folders import channel_folder, without_blank
from hf_vicreg.training.images.channels.raster import Raster
from hf_vicreg.training.images.channels.windows import box_at, is_blank, level_for, windows_of
from hf_vicreg.training.images.order import ViewDataset, collate
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.run.arguments import ViewsConfig

SIDE = 512


def slide(seed=0):
    """A smooth picture of two channels; its left half is empty."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    pixels = np.stack([np.sin(9 * x + seed) * np.cos(7 * y), np.cos(11 * x * y)], -1)
    pixels = ((pixels + 1) * 20_000).astype(np.uint16)
    pixels[:, : SIDE // 2] = 100
    return pixels


def write_pyramid(path, pixels):
    planes = pixels.transpose(2, 0, 1)
    options = {"tile": (64, 64), "photometric": "minisblack", "planarconfig": "separate", "compression": "zlib"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(planes, subifds=2, metadata={"axes": "CYX"}, **options)
        file.write(planes[:, ::2, ::2], subfiletype=1, **options)
        file.write(planes[:, ::4, ::4], subfiletype=1, **options)


def write_zarr_pyramid(path, pixels):
    group = zarr.open_group(path, mode="w", zarr_format=3)
    for level in range(3):
        part = pixels[:: 2**level, :: 2**level].transpose(2, 0, 1)
        array = group.create_array(str(level), shape=part.shape, chunks=(1, 64, 64), dtype="uint16")
        array[:] = part
    axes = [{"name": name} for name in "cyx"]
    scales = [{"axes": axes, "datasets": [{"path": str(level)} for level in range(3)]}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": scales}


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    write_pyramid(folder / "a.ome.tif", slide())
    write_zarr_pyramid(folder / "b.zarr", slide())
    np.save(folder / "c.npy", slide())
    tifffile.imwrite(folder / "d.tif", slide()[:96, 256:352], planarconfig="contig", photometric="minisblack")
    return folder


@pytest.mark.parametrize(
    ("height", "width", "window"), [(512, 512, 128), (300, 700, 256), (100, 90, 128), (129, 64, 128)]
)
def test_windows_cover_an_image_and_have_its_size_or_their_own(height, width, window):
    covered = np.zeros((height, width), int)
    for left, top, right, bottom in windows_of(height, width, window):
        assert (right - left, bottom - top) == (min(width, window), min(height, window))
        covered[top:bottom, left:right] += 1
    assert covered.min() == 1
    assert len(windows_of(height, width, window)) == -(-height // window) * -(-width // window)


def test_each_window_is_an_image_and_small_images_are_whole(slides):
    source = channel_folder(str(slides), 2, window=128)
    assert len(source) == 3 * 16 + 1
    assert source.describe(5) == "a.ome.tif, pixels 128-256 x 128-256"
    assert source.describe(48) == "d.tif"
    for first in (0, 16, 32):  # of each of the three files
        np.testing.assert_array_equal(np.asarray(source.read(first + 7)), slide()[128:256, 384:512])
    assert source.first(3).survey().median_size == (128, 128)
    assert source.digest(5) != source.digest(6)


def test_a_sample_of_windows_is_of_all_columns_and_rows(tmp_path):
    for number in range(8):
        np.save(tmp_path / f"{number}.npy", np.zeros((640, 640, 1), np.uint8))
    source = channel_folder(str(tmp_path), 1, window=16)  # 40 windows a row: every 200th is in the first column
    sampled = source.sampled()
    assert len(sampled) == 64
    assert list(sampled) == list(source.sampled())
    assert all(200 * part <= index < 200 * (part + 1) for part, index in enumerate(sampled))
    for side in (2, 3):
        places = source.items[sampled, side] // 16
        assert len(set(places.tolist())) > 20
        assert places.max() - places.min() > 30
    whole = channel_folder(str(tmp_path), 1)
    assert list(whole.sampled()) == list(range(8))


@pytest.mark.parametrize("name", ["a.ome.tif", "b.zarr"])
def test_the_level_of_the_pyramid_is_the_one_that_a_view_needs(slides, name):
    file = open_channels(str(slides / name), 2, lazy=True)
    assert [file.size(level) for level in range(3)] == [(512, 512), (256, 256), (128, 128)]
    assert [level_for(file, reduction)[0] for reduction in (1, 1.9, 2, 3, 4, 9)] == [0, 0, 1, 1, 2, 2]
    source = channel_folder(str(slides), 2, window=256)
    index = source.file_names.index(name) * 4 + 1  # the upper right
    raster = source.read(index, lambda width, height: 3)
    assert raster.size == (128, 128)
    np.testing.assert_array_equal(np.asarray(raster), slide()[:256:2, 256::2])
    assert box_at((3, 5, 4, 6), (4.0, 4.0), (128, 128)) == (0, 1, 1, 2)


def test_views_of_a_window_are_those_of_the_same_pixels_in_memory(slides):
    source = channel_folder(str(slides), 2, window=256)

    whole = Raster(ChannelFile([np.ascontiguousarray(slide()[:256, 256:])], "YXC", 2))
    for config in (ViewsConfig(), ViewsConfig(rotation_degrees=20)):
        sampler = ViewSampler.of_views(config, (32, 32))[0]
        for seed in range(5):
            for first in (0, 4, 8):
                found, _ = sampler(source.read(first + 1), random.Random(seed))
                expected, _ = sampler(whole, random.Random(seed))
                assert found.dtype == torch.uint16
                assert torch.equal(found, expected)


def test_a_crop_reads_only_the_tiles_that_it_touches(slides, monkeypatch):
    file = open_channels(str(slides / "a.ome.tif"), 2, lazy=True)
    read = []
    seek = tifffile.FileHandle.read_segments
    monkeypatch.setattr(
        tifffile.FileHandle,
        "read_segments",
        lambda self, offsets, *rest, **named: read.append(len(offsets)) or seek(self, offsets, *rest, **named),
    )
    plain = tifffile.FileHandle.read
    monkeypatch.setattr(tifffile.FileHandle, "read", lambda self, size=-1, /: read.append(1) or plain(self, size))
    file.read(0, 0, (130, 200, 190, 250))  # inside one tile of each of two channels
    assert 0 < sum(read) <= 2 * 2  # a read each, and perhaps one more for where it lies


def test_blank_windows_are_left_out_and_counted(slides, caplog):
    source = channel_folder(str(slides), 2, window=128)
    with caplog.at_level("INFO"):
        kept = without_blank(source, [100, 100], [40_000, 40_000])
    assert "24 of 48 windows are blank and left out" in caplog.text
    assert len(kept) == 25
    assert kept.fingerprint != source.fingerprint
    assert all(np.asarray(kept.read(index))[:, :, 0].std() > 100 for index in range(len(kept)))
    with pytest.raises(InputError, match="expected windows that hold something"):
        without_blank(source.first(2), [0, 0], [60_000, 60_000])


def test_a_window_of_few_bright_cells_is_not_blank():
    dice = np.random.default_rng(0)
    whole = np.full((1024, 1024, 1), 100, np.float32) + dice.normal(0, 5, (1024, 1024, 1)).astype(np.float32)
    empty = whole.copy()
    for top, left in dice.integers(0, 1000, (10, 2)):
        whole[top : top + 20, left : left + 20] = 3000
    bounds = np.array([90], np.float32), np.array([3000], np.float32)
    for pixels, blank in ((whole, False), (empty, True)):
        levels = [pixels]
        for _ in range(6):  # averaged, as scanners make them
            last = levels[-1]
            levels.append((last[::2, ::2] + last[1::2, ::2] + last[::2, 1::2] + last[1::2, 1::2]) / 4)
        assert is_blank(ChannelFile(levels, "YXC", 1), 0, (0, 0, 1024, 1024), *bounds) == blank
    small = np.full((256, 256, 1), 100, np.float32)  # without a pyramid it is looked at whole
    small[0:30, 118:138] = 3000  # between the samples
    assert not is_blank(ChannelFile([small], "YXC", 1), 0, (0, 0, 256, 256), *bounds)


@pytest.mark.parametrize("normalisation", ["percentile", "minmax", "fixed 0 65535"])
def test_what_remains_is_measured_and_does_not_hang_on_the_normalisation(tmp_path, caplog, normalisation):
    folder, dice = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    pixels = dice.integers(100, 110, (160, 176, 1)).astype(np.uint16)
    pixels[48:112, 48:112] = dice.integers(500, 3000, (64, 64, 1))  # 16 of 110 windows
    pixels[55, 55] = 65535  # a hot pixel
    np.save(folder / "a.npy", pixels)
    model = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    flags = {
        "out": tmp_path / "run",
        "data": folder,
        "model": model | {"image_size": 16, "patch_size": 8, "num_channels": 1},
        "vicreg": {"expander_sizes": [16, 16]},
        "batch_size": 4,
        "max_steps": 2,
        "checkpointing_steps": 1,
        "device": "cpu",
        "normalisation": normalisation,
        "window": 16,
    }
    with pytest.raises(RunStopped):
        pretrain(**flags, max_time=1e-6)
    with caplog.at_level("INFO"):  # by a stored normalisation the same windows are blank, or it would be refused
        processor = pretrain(**flags, resume_from_checkpoint="latest").processor
    assert "94 of 110 windows are blank and left out" in caplog.text
    tissue = pixels[48:112, 48:112].astype(float)
    bounds = {"percentile": np.percentile(tissue, (0.5, 99.5)), "minmax": (tissue.min(), tissue.max())}
    low, high = bounds.get(normalisation, (0, 65535))
    scaled = ((tissue - low) / (high - low)).clip(0, 1)
    found = [*processor.channel_low, *processor.channel_high, *processor.image_mean, *processor.image_std]
    np.testing.assert_allclose(found, [low, high, scaled.mean(), scaled.std()])


def test_loader_processes_read_windows_as_this_one_does(slides):
    source = without_blank(channel_folder(str(slides), 2, window=128), [100, 100], [40_000, 40_000])
    np.asarray(source.read(0))  # open here before the loader's processes are forked
    samplers = ViewSampler.of_views(ViewsConfig(), (32, 32))
    dataset = ViewDataset(source, samplers, 0)
    keys = [(0, index) for index in range(24)]
    batches = [
        torch.cat(
            [one["views"] for one in DataLoader(dataset, 4, sampler=keys, num_workers=count, collate_fn=collate)]
        )
        for count in (0, 2)
    ]
    assert torch.equal(*batches)


def test_a_file_that_is_damaged_inside_is_replaced(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", slide()[:, :, 0], tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        offsets = file.pages[0].dataoffsets
    encoded = bytearray((tmp_path / "a.tif").read_bytes())
    for offset in offsets[:40]:
        encoded[offset : offset + 20] = bytes(20)
    (tmp_path / "a.tif").write_bytes(encoded)
    source = channel_folder(str(tmp_path), 1, window=128)
    assert source.refusal(0).kind == "damaged"
    assert source.refusal(len(source) - 1) is None
    sample = ViewDataset(source, ViewSampler.of_views(ViewsConfig(), (32, 32)), 0)[0, 0]
    assert sample["views"] is not None
    assert 0 in sample["unusable"]


def test_few_files_stay_open(slides, monkeypatch):
    channel_source._opened.clear()
    monkeypatch.setattr(channel_source, "KEPT_OPEN", 2)
    source = channel_folder(str(slides), 2, window=128)
    for index in (0, 16, 32, 48, 0):
        np.asarray(source.read(index))
        assert len(channel_source._opened) <= 2


def test_of_files_that_are_decoded_whole_one_is_kept(slides, tmp_path):
    """PNG has no parts: eight decoded slides in each loader process are more than the memory there is."""
    channel_source._opened.clear()
    for name in range(3):
        Image.fromarray(slide()[:, :, 0].astype(np.uint8)).save(tmp_path / f"{name}.png")
    decoded = channel_folder(str(tmp_path), 1, window=128)
    for index in range(0, len(decoded), 5):
        np.asarray(decoded.read(index))
    assert len(channel_source._opened) == 1
    source = channel_folder(str(slides), 2, window=128)
    np.asarray(source.read(0))
    np.asarray(decoded.read(0))
    assert len(channel_source._opened) == 2  # a slide that is read by parts stays
