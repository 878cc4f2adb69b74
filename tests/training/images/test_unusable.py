"""`unusable.jsonl`: each image that was passed over, with its reason."""

import json
import threading
import time

import pytest
from PIL import Image

from hf_vicreg import pretrain
from hf_vicreg.training.errors import RunStopped
from hf_vicreg.training.images.sources import load_sources
from hf_vicreg.training.images.unusable import write_unusable


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "a.png")
    (folder / "b\x1b[31m\n.png").write_bytes(b"")
    (folder / "c.jpg").write_bytes(b"<html>")
    return load_sources(train_dir=str(folder))[0]


def entries(folder):
    return [json.loads(line) for line in (folder / "unusable.jsonl").read_text().splitlines()]


def test_reasons_are_found_again_from_indices_alone(source, tmp_path, caplog):
    """What a checkpoint holds is enough, so a resumed run writes what an uninterrupted one does."""
    write_unusable(tmp_path, source, [2, 1])
    assert [(one["index"], one["kind"], one["reason"]) for one in entries(tmp_path)] == [
        (1, "empty", "empty file"),
        (2, "not an image", "not an image (a web page)"),
    ]
    assert entries(tmp_path)[0]["name"] == "b\x1b[31m\n.png"
    assert "2 image(s) were not usable" in caplog.text
    assert "\x1b" not in caplog.text  # a name cannot steer the terminal
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["unusable.jsonl"]


def test_an_image_that_was_mended_since_is_said_to_be(source, tmp_path):
    write_unusable(tmp_path, source, [0])
    assert entries(tmp_path)[0]["reason"] == "could not be used during the run, can be read now"


def test_nothing_passed_over_leaves_no_file(source, tmp_path):
    write_unusable(tmp_path, source, [])
    assert not (tmp_path / "unusable.jsonl").exists()


def test_a_run_that_is_stopped_names_what_it_passed_over(tmp_path, tiny_recipe, image_folder):
    images, folder = image_folder(64), tmp_path / "run"
    (images / "0003.png").write_bytes(b"broken")

    def stop_after_an_epoch():
        log = folder / "log.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < 3:
            time.sleep(0.01)
        (folder / "stop").touch()

    asking = threading.Thread(target=stop_after_an_epoch, daemon=True)
    asking.start()
    with pytest.raises(RunStopped, match="stopped by the stop file"):
        pretrain(out=folder, data=images, **tiny_recipe | {"max_steps": 1_000_000})
    asking.join()
    (entry,) = map(json.loads, (folder / "unusable.jsonl").read_text().splitlines())
    assert entry["name"].endswith("0003.png")
