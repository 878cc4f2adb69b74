"""`hf-vicreg prepare --num_channels --window`: the pixels of the files, windows that hold something, trained on."""

import numpy as np
import pyarrow.parquet
import pytest
import tifffile

from hf_vicreg.cli import main
from hf_vicreg.modeling.channel_files import open_channels
from hf_vicreg.training.images.channels.channel_source import as_channels
from hf_vicreg.training.images.sources import load_sources
from hf_vicreg.training.prepare import store as module
from hf_vicreg.training.prepare.channel_store import encoded
from hf_vicreg.training.prepare.store import prepare


def stored(out, num_channels):
    source, _ = load_sources(dataset_name=str(out))
    return [np.asarray(as_channels(source, num_channels).read(index)) for index in range(len(source))]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("shape", [(7, 9, 1), (5, 8, 3), (5, 6, 5), (12, 4, 4)], ids=str)
def test_pixels_come_back_as_they_were(dtype, shape):
    values = np.random.default_rng(0).integers(0, 120, shape) * 200 / (200 if dtype == np.uint8 else 1)
    pixels = (values - (9000 if dtype in (np.int16, np.float32) else 0)).astype(dtype)
    read = open_channels(encoded(pixels), shape[2]).read()
    assert read.dtype == dtype
    assert np.array_equal(read, pixels)


def slide(path, size=(100, 150), channels=2, *, seed=0):
    """A TIFF in strips, empty in its upper left corner."""
    pixels = np.random.default_rng(seed).integers(500, 60000, (channels, *size)).astype(np.uint16)
    pixels[:, :50, :50] = 500
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata={"axes": "CYX"}, ome=True, rowsperstrip=1)
    return pixels.transpose(1, 2, 0)


def test_windows_that_hold_something_are_stored_and_trained_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "slides").mkdir()
    pixels = [slide(tmp_path / "slides" / f"{seed}.tif", seed=seed) for seed in range(3)]
    (tmp_path / "slides" / "damaged.tif").write_bytes(b"II*\x00 and no more")
    out = tmp_path / "out"
    flags = ["--num_channels", "2", "--window", "50", "--num_proc", "2"]
    assert main(["prepare", str(tmp_path / "slides"), str(out), *flags]) == 0
    printed = capsys.readouterr().out
    assert "train: 15 images stored, 1 unreadable skipped: damaged.tif" in printed  # 6 windows a slide, one empty
    assert f"--dataset_name {out} --model.num_channels 2" in printed
    windows = [one[top : top + 50, left : left + 50] for one in pixels for top in (0, 50) for left in (0, 50, 100)]
    expected = [one for index, one in enumerate(windows) if index % 6]
    assert all(np.array_equal(one, other) for one, other in zip(stored(out, 2), expected, strict=True))
    # a row group is read at once, and may not hold more than 2 GiB
    monkeypatch.setattr(module, "BYTES_A_GROUP", 8_000)
    assert main(["prepare", str(tmp_path / "slides"), str(tmp_path / "small"), *flags]) == 0
    groups = pyarrow.parquet.ParquetFile(next((tmp_path / "small").glob("*.parquet")))
    largest = max(len(one.as_py()["bytes"]) for one in groups.read()["image"])
    assert groups.num_row_groups >= 15 // max(1, 8_000 // largest) > 1
    assert len(stored(tmp_path / "small", 2)) == 15
    # the same again, and another run's folder refused
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(["prepare", str(tmp_path / "slides"), str(out), *flags]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert main(["prepare", str(tmp_path / "slides"), str(out), *flags[:2], "--window", "40"]) == 2
    assert "was begun from other images" in capsys.readouterr().err
    small = "--model.hidden_size 16 --model.num_hidden_layers 1 --model.num_attention_heads 1 --model.patch_size 8"
    vicreg = "--model.intermediate_size 16 --model.image_size 16 --vicreg.expander_sizes [16]"
    run = [*small.split(), *vicreg.split(), "--batch_size", "4", "--max_steps", "2", "--model.num_channels", "2"]
    assert main(["pretrain", str(out), *run, "--output_dir", str(tmp_path / "run")]) == 0


def test_images_of_eight_bits_in_three_colours_stay_pictures(tmp_path):
    (tmp_path / "slides").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "slides" / "one.tif", pixels, photometric="rgb")
    done = prepare(tmp_path / "slides", tmp_path / "out", window=30, num_proc=1)
    assert done.images == {"train": 4}
    source, _ = load_sources(dataset_name=str(tmp_path / "out"))
    assert np.array_equal(np.asarray(source.read(1)), pixels[:30, 10:])  # read as photographs are
    assert not done.measured
    (tmp_path / "deeper").mkdir()
    tifffile.imwrite(tmp_path / "deeper" / "one.tif", pixels.astype(np.uint16), photometric="rgb")
    assert prepare(tmp_path / "deeper", tmp_path / "deep", window=30, num_proc=1).measured


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window", "0"], "`window`: expected at least 1, got 0"),
        (["--num_channels", "0"], "`num_channels`: expected at least 1, got 0"),
        (["--num_channels", "2", "--size", "32"], "`size`: expected none beside channels or windows"),
        (["--num_channels", "5", "--window", "50"], "2 channel(s) where 5 are wanted"),
    ],
    ids=["window", "channels", "size", "others"],
)
def test_bad_flags_get_one_line(tmp_path, flags, message, capsys):
    (tmp_path / "slides").mkdir()
    slide(tmp_path / "slides" / "one.tif")
    assert main(["prepare", str(tmp_path / "slides"), str(tmp_path / "out"), "--num_proc", "1", *flags]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line
    assert not (tmp_path / "out").exists()


def test_only_folders_of_files_are_stored_by_channels(tmp_path, capsys):
    assert main(["prepare", "digits", str(tmp_path / "out"), "--num_channels", "1"]) == 2
    assert "`source`: expected a folder of image files" in capsys.readouterr().err
