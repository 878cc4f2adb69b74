"""`hf-vicreg inspect images`: a whole folder, told truly."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_vicreg.cli import main


def picture(height, width, seed=0, mode="RGB"):
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    (images / "deeper").mkdir(parents=True)
    for index, (height, width) in enumerate([(40, 30), (70, 100), (300, 260)]):
        picture(height, width, index).save(images / f"{index}.png")
    (images / "deeper" / "copy.png").write_bytes((images / "1.png").read_bytes())
    picture(50, 50, 3).save(images / "photo.jpg")
    Image.fromarray(np.full((50, 50), 3000, np.uint16)).save(images / "deep.tiff")
    content = (images / "2.png").read_bytes()
    (images / "truncated.png").write_bytes(content[: len(content) // 2])
    (images / "page.jpg").write_bytes(b"<html>gone</html>")
    (images / "gone.png").symlink_to(tmp_path / "nowhere.png")
    picture(6, 50, 4).save(images / "thin.png")
    (images / "notes.txt").write_text("not an image")
    return images


def test_a_whole_folder_is_told(folder, tmp_path, capsys):
    output = tmp_path / "found.json"
    flags = ["--patch_size", "8", "--image_size", "64", "--json", str(output), "--num_proc", "2"]
    assert main(["inspect", "images", str(folder), *flags]) == 0
    found = json.loads(output.read_text())
    assert (found["num_images"], found["usable"]) == (10, 6)
    assert found["height"] == {"min": 40, "median": 60, "max": 300}
    assert found["width"] == {"min": 30, "median": 75, "max": 260}
    assert found["short_sides"] == {"1 to 31": 1, "32 to 63": 2, "64 to 127": 2, "128 to 223": 0, "224 to 383": 1}
    assert found["below_image_size"] == 3
    assert found["modes"] == {"RGB": 5, "I;16": 1}
    assert found["formats"] == {"PNG": 4, "TIFF": 1, "JPEG": 1}
    assert found["duplicates"] == [["1.png", "deeper/copy.png"]]
    assert found["labels"] is None
    assert found["other_files"] == {".txt": 1}
    assert {one["name"]: one["reason"] for one in found["skipped"]} == {
        "gone.png": "missing file",
        "page.jpg": "not an image (a web page)",
        "thin.png": "50x6 pixels, smaller than a patch of 8x8 (width x height)",
        "truncated.png": "truncated PNG",
    }
    text = capsys.readouterr().out
    for said in ("10 images, 6 usable", "1.png = deeper/copy.png", "I;16 (16 bits)", "1 truncated: truncated.png"):
        assert said in text
    assert "3 are below 64 and would be enlarged" in text


def test_files_that_were_read_by_channels_are_not_called_others(tmp_path, capsys):
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, np.random.default_rng(0).integers(0, 999, (2, 16, 16)).astype(np.uint16))
    (tmp_path / "c.zarr").mkdir()
    (tmp_path / "c.zarr" / "0.0").write_bytes(b"a chunk")
    (tmp_path / "notes.txt").write_text("not an image")
    assert main(["inspect", "images", str(tmp_path), "--num_channels", "2", "--num_proc", "1"]) == 0
    (line,) = (one for one in capsys.readouterr().out.splitlines() if one.startswith("not read"))
    assert line.split(": ") == ["not read    files that are no images", "1 .txt"]


def test_tables_and_their_labels(tmp_path, capsys):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [picture(20, 20, seed) for seed in range(5)], "label": [0, 0, 0, 1, 1]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    assert main(["inspect", "images", str(tmp_path / "set")]) == 0
    text = capsys.readouterr().out
    assert "5 images, 5 usable" in text
    assert "2 classes, 2 to 3 images in each" in text
    assert "0 images cannot be used" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all"], "`data`: expected a folder of images"),
        (["IMAGES", "--patch_size", "0"], "`patch_size`: expected at least 1, got 0"),
        (["IMAGES", "--json", "nowhere/found.json"], "`--json`: expected a file in a folder that exists"),
        (["EMPTY"], "`data`: expected files of images in"),
    ],
    ids=["nowhere", "patch", "json", "empty"],
)
def test_bad_input_gets_one_line(folder, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    named = {"IMAGES": str(folder), "EMPTY": str(tmp_path / "empty")}
    assert main(["inspect", "images", *(named.get(one, one) for one in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
