"""`hf-vicreg prepare`: what it stores, what it skips, and that a kill costs one shard at most."""

import os
import signal
import sys
import time

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_vicreg.cli import main
from hf_vicreg.training.images.sources import load_sources
from hf_vicreg.training.prepare import store as module
from hf_vicreg.training.prepare.store import prepare


def photographs(folder, count, size=(120, 80), form="jpg"):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:04d}.{form}")
    return folder


def test_large_images_shrink_small_ones_stay_broken_ones_are_counted(tmp_path, capsys):
    folder = photographs(tmp_path / "images", 5)
    Image.open(folder / "0001.jpg").resize((30, 20)).save(folder / "0001.png")
    Image.open(folder / "0002.jpg").resize((30, 20)).save(folder / "0002.bmp")
    (folder / "0003.jpg").write_bytes(b"broken")
    (folder / "0005.jpg").symlink_to(tmp_path / "nowhere")
    assert main(["prepare", str(folder), str(tmp_path / "out"), "--size", "40", "--num_proc", "1"]) == 0
    printed = capsys.readouterr().out
    assert "train: 6 images stored, 2 unreadable skipped: 0003.jpg, 0005.jpg" in printed
    assert f"--dataset_name {tmp_path / 'out'}" in printed
    source, test = load_sources(dataset_name=str(tmp_path / "out"))
    originals, _ = load_sources(train_dir=str(folder))
    assert (source.labels, test) == (None, None)
    kept = [name for name in originals.file_names if name not in ("0003.jpg", "0005.jpg")]
    for index, name in enumerate(kept):
        original = originals.read(originals.file_names.index(name))
        stored = source.read(index)
        if name == "0001.png":
            assert source.read_bytes(index) == (folder / name).read_bytes()
        assert stored.size == (original.size if name.endswith(("png", "bmp")) else (60, 40))
        difference = np.asarray(stored).astype(int) - np.asarray(original.resize(stored.size)).astype(int)
        assert np.abs(difference).mean() < 12  # halved colours of a JPEG; another picture is off by 60


def test_labels_names_and_the_test_split_are_kept(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    for split, labels in (("train", [0, 1, 1]), ("validation", [1, 0])):
        images = [Image.new("RGB", (50, 50), (index * 60, 0, 0)) for index in range(len(labels))]
        table = datasets.Dataset.from_dict({"img": images, "kind": labels}, features=features)
        table.to_parquet(folder / f"{split}.parquet")
    done = prepare(folder, tmp_path / "out", size=20, num_proc=1, label_column_name="kind", test_split="validation")
    assert done.images == {"train": 3, "test": 2}
    source, test = load_sources(dataset_name=str(tmp_path / "out"))
    assert (source.labels, test.labels) == ([0, 1, 1], [1, 0])
    assert source.label_names == ["cat", "dog"]
    assert source.read(2).size == (20, 20)
    assert abs(source.read(2).getpixel((10, 10))[0] - 120) < 5


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
def test_processes_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IMAGES_A_SHARD", 7)
    folder = photographs(tmp_path / "images", 20)
    (folder / "0009.jpg").write_bytes(b"")
    for name, processes in (("one", 1), ("two", 2)):
        assert prepare(folder, tmp_path / name, size=40, num_proc=processes).skipped == {"train": ["0009.jpg"]}
    files = sorted(path.name for path in (tmp_path / "one").glob("*.parquet"))
    assert files == [f"train-0000{shard}-of-00003.parquet" for shard in range(3)]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_killed_and_started_again_it_goes_on_behind_the_complete_shards(
    tmp_path, run_process, monkeypatch, caplog, capsys
):
    folder = photographs(tmp_path / "images", 60, size=(800, 600))
    (folder / "0001.jpg").write_bytes(b"broken")
    script = tmp_path / "small_shards.py"
    script.write_text(
        "import sys\n"
        "from hf_vicreg.training.prepare import store\n"
        "store.IMAGES_A_SHARD = 6\n"
        "from hf_vicreg.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, script, "prepare", folder, tmp_path / "out", "--num_proc", 1]
    process = run_process.start(command)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "train-00002-of-00010.parquet").exists():
        assert time.monotonic() < deadline, "no shard in time"
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    complete = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("train-*.parquet")}
    assert 3 <= len(complete) < 10
    monkeypatch.setattr(module, "IMAGES_A_SHARD", 6)
    assert main([str(part) for part in command[2:]]) == 0
    assert "images are there already" in caplog.text
    assert "59 images stored, 1 unreadable skipped: 0001.jpg" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == written for path, written in complete.items())
    source, _ = load_sources(dataset_name=str(tmp_path / "out"))
    assert len(source) == 59
    assert {source.read(index).size for index in range(59)} == {(341, 256)}


def test_a_file_is_whole_or_absent(tmp_path):
    target = tmp_path / "shard.parquet"

    def half(place):
        place.write_bytes(b"half")
        assert not target.exists()
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        module.write_whole(target, half)
    assert list(tmp_path.iterdir()) == []
    module.write_whole(target, lambda place: place.write_bytes(b"whole"))
    assert target.read_bytes() == b"whole"
    (tmp_path / ".writing_123_shard.parquet").write_bytes(b"of a process that was killed")
    module.remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("case", ["foreign", "other-size", "other-images", "file", "nothing", "size"])
def test_what_it_cannot_do_is_said_and_nothing_is_touched(tmp_path, case, capsys):
    folder = photographs(tmp_path / "images", 2, size=(30, 20))
    out = tmp_path / "out"
    arguments = ["prepare", str(folder), str(out), "--num_proc", "1", "--size", "16"]
    if case == "foreign":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        message = "`out`: expected a new or empty folder"
    elif case == "file":
        out.write_text("mine")
        message = "which is a file"
    elif case == "nothing":
        for path in folder.iterdir():
            path.write_bytes(b"broken")
        message = "`source`: expected readable images in images, none of 2 can be read; "
    elif case == "size":
        arguments[-1] = "0"
        message = "`size`: expected at least 1 pixel, got 0"
    else:
        assert main(arguments) == 0
        message = "was begun from other images or with another size"
        if case == "other-size":
            arguments[-1] = "17"
        else:
            (folder / "0000.jpg").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line
    if case != "nothing":
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
