"""Images named by one word, and the folder of a run that names none."""

import re

import pytest

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.run.flags import parse_flags
from hf_vicreg.training.run.places import with_places
from hf_vicreg.training.run.settings import explicit_settings


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/a.png", "shards/train.parquet", "runs/old/recipe.yaml", "file.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty" / "below").mkdir(parents=True)
    return tmp_path


def settled(*flags):
    return with_places(explicit_settings(parse_flags(list(flags))))


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ("photos", "train_dir"),
        ("./photos/", "train_dir"),
        ("shards", "dataset_name"),
        ("digits", "dataset_name"),
        ("owner/name", "dataset_name"),
    ],
)
def test_images_by_one_word(here, data, key):
    settings = settled(data, "--output_dir", "x")
    assert settings[key] == data
    assert {"train_dir", "dataset_name"} & settings.keys() == {key}


def test_data_replaces_that_of_a_recipe(here):
    settings = settled("photos", "--config", "digits")
    assert settings["train_dir"] == "photos"
    assert "dataset_name" not in settings


def test_a_run_is_named_after_its_images_and_the_time(here, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "20261126-141500")
    assert settled("./photos/")["output_dir"] == "runs/photos-20261126-141500"
    (here / "runs" / "photos-20261126-141500").mkdir()
    assert settled("photos")["output_dir"] == "runs/photos-20261126-141500-2"
    assert settled("owner/some_images")["output_dir"] == "runs/some_images-20261126-141500"
    assert settled("photos", "--output_dir", "mine")["output_dir"] == "mine"
    assert not (here / "mine").exists()


def test_the_time_is_that_of_the_clock(here):
    assert re.fullmatch(r"runs/photos-\d{8}-\d{6}", settled("photos")["output_dir"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "`data`: expected a folder of images"),
        (["photo"], "did you mean 'photos'?"),
        (["file.txt"], "'file.txt', which is a file"),
        (["photos", "--train_dir", "photos"], "`data`, `train_dir`: expected one of the two"),
        (["empty"], "`data`: expected files of images in empty, found no file; name another folder."),
        (["--train_dir", "empty"], "`train_dir`: expected files of images in empty, found no file"),
        (["--dataset_name", "empty"], "`dataset_name`: expected files of images in empty, found no file"),
        (["photos", "more"], "`more`: expected a flag"),
        (["photos/more"], "`dataset_name`: expected a Hub id or an existing folder, got 'photos/more'"),
        (["--dataset_name", "./shard"], "did you mean './shards'?"),
        (["--train_dir", "file.txt"], "`train_dir`: expected a folder of images, got 'file.txt', which is a file"),
        (["photos", "--output_dir", "shards"], "`output_dir`: expected a new or empty folder"),
        (["photos", "--resume_from_checkpoint", "latest"], "got none; the newest are runs/old."),
    ],
)
def test_what_is_not_there_is_named(here, flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        settled(*flags)


def test_processes_of_a_launcher_need_one_name_for_all(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="`output_dir`: expected a folder that all processes write to"):
        settled("photos")
