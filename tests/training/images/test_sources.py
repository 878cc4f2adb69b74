"""Images from folders, tables and the package itself."""

import pickle
import shutil
import socket

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.digits import digit_images
from hf_vicreg.training.images.sources import load_sources
from hf_vicreg.training.run.places import data_setting, is_image_folder


def parquet_folder(path, columns, features):
    path.mkdir()
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path / "train.parquet")
    return path


def labelled(path, split, labels, feature=None):
    """Adds a split of one-colour images with the given labels to a parquet folder."""
    path.mkdir(exist_ok=True)
    images = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), "label": feature or datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
        path / f"{split}.parquet"
    )


@pytest.mark.parametrize("name", ["boxes", "my/boxes"])
def test_a_mistyped_folder_is_told_at_once_where_the_hub_is_out_of_reach(name, monkeypatch, capfd):
    """With the Hub at a port that nobody listens on: no retries, one line."""
    from huggingface_hub import constants

    with socket.socket() as taken:  # bound and not listening: refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        with pytest.raises(InputError) as caught:
            load_sources(dataset_name=name)
    (line,) = str(caught.value).splitlines()
    assert "there is no folder of that name here" in line
    assert "the Hub was not reached (ConnectError)" in line
    assert "".join(capfd.readouterr()) == ""


def test_the_column_of_images_is_said_once(tmp_path, caplog):
    for split in ("train", "test"):
        labelled(tmp_path / "set", split, [0, 1, 2])
    with caplog.at_level("INFO"):
        _, test = load_sources(dataset_name=str(tmp_path / "set"))
    assert len(test) == 3
    assert caplog.text.count("image column 'image', labels found") == 1


def test_images_of_a_probe_are_of_every_class_where_classes_come_one_after_the_other(tmp_path):
    for split, each in (("train", 12), ("test", 6)):
        labelled(tmp_path / "sorted", split, [label for label in range(5) for _ in range(each)])
    for source in load_sources(dataset_name=str(tmp_path / "sorted")):
        chosen = source.for_probe(7)
        assert len(chosen) == 7
        assert set(chosen.labels) == set(range(5))
        assert [source.labels[place * len(source) // 7] for place in range(7)] == chosen.labels
        assert [chosen.read_bytes(one) for one in (0, 6)] == [
            source.read_bytes(0),
            source.read_bytes(len(source) * 6 // 7),
        ]
        assert len(source.for_probe(1000)) == len(source)
    # where the first ones are of every class, it is they, as figures from before have it
    labelled(tmp_path / "mixed", "train", [0, 1, 2, 0, 1, 2, 0, 1])
    mixed, _ = load_sources(dataset_name=str(tmp_path / "mixed"))
    assert mixed.for_probe(4).fingerprint == mixed.first(4).fingerprint


def test_held_out_classes_are_told_by_their_names(tmp_path, caplog):
    """A folder that lacks a class numbers those after it differently, and a swap would pass for a bad encoder."""

    def split(names, labels):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        images = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(len(labels))]
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)

    train = split(["bird", "cat", "dog"], [0, 1, 2])
    for name, test in (("same", split(["cat", "dog"], [0, 1])), ("other", split(["cat", "fox"], [0, 1]))):
        datasets.DatasetDict(train=train, test=test, extra=test).save_to_disk(tmp_path / name)
    for test_split in (None, "extra"):
        _, held_out = load_sources(dataset_name=str(tmp_path / "same"), test_split=test_split)
        assert held_out.labels == [1, 2]
        assert list(held_out.label_names) == ["bird", "cat", "dog"]
    _, held_out = load_sources(dataset_name=str(tmp_path / "other"))
    assert held_out is None
    assert "'fox' among the held-out images is no class of the training images; no accuracy is measured" in caplog.text


def test_split_with_hidden_labels_is_no_test_split(tmp_path):
    folder = tmp_path / "set"
    labelled(folder, "train", [0, 1, 2])
    labelled(folder, "validation", [2, 1])
    labelled(folder, "test", [-1, -1, -1, -1])
    source, test = load_sources(dataset_name=str(folder))
    assert source.labels == [0, 1, 2]
    assert test.labels == [2, 1]
    with pytest.raises(InputError, match=r"`label_column_name`: expected class indices .* got -1"):
        load_sources(dataset_name=str(folder), test_split="test", label_column_name="label")


def test_labels_that_are_no_classes_are_left_aside(tmp_path):
    labelled(tmp_path / "set", "train", ["cat", "dog"], datasets.Value("string"))
    source, test = load_sources(dataset_name=str(tmp_path / "set"))
    assert source.labels is None
    assert test is None
    with pytest.raises(InputError, match=r"`label_column_name`: expected class indices .* got 'cat'"):
        load_sources(dataset_name=str(tmp_path / "set"), label_column_name="label")


def test_fingerprint_follows_the_content_wherever_it_lies(tmp_path, image_folder):
    labelled(tmp_path / "set", "train", [0, 1, 2])
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    labelled(tmp_path / "other", "train", [0, 1, 2, 3])
    folder = image_folder(5)
    shutil.copytree(folder, tmp_path / "elsewhere")

    def fingerprint(**where):
        return load_sources(**where)[0].fingerprint

    one = fingerprint(dataset_name=str(tmp_path / "set"))
    assert fingerprint(dataset_name=str(tmp_path / "copy")) == one
    assert fingerprint(dataset_name=str(tmp_path / "other")) != one
    assert fingerprint(train_dir=str(tmp_path / "elsewhere")) == fingerprint(train_dir=str(folder))
    Image.new("RGB", (9, 9)).save(tmp_path / "elsewhere" / "0002.png")  # another picture of the same name
    assert fingerprint(train_dir=str(tmp_path / "elsewhere")) != fingerprint(train_dir=str(folder))


def test_sources_travel_to_loader_processes(tmp_path, image_folder):
    labelled(tmp_path / "set", "train", [0, 1, 2])
    for where in (
        {"train_dir": str(image_folder(3))},
        {"dataset_name": str(tmp_path / "set")},
        {"dataset_name": "digits"},
    ):
        source, _ = load_sources(**where)
        again = pickle.loads(pickle.dumps(source))  # our own object and no file: what a loader process is handed
        assert again.read(2).tobytes() == source.read(2).tobytes()


def test_small_and_broken_images_are_unusable(image_folder):
    folder = image_folder(4, size=20)
    Image.new("RGB", (40, 15)).save(folder / "0001.png")
    content = (folder / "0002.png").read_bytes()
    (folder / "0002.png").write_bytes(content[:50] + bytes(40) + content[90:])
    (folder / "0003.png").write_bytes(b"")
    source, _ = load_sources(train_dir=str(folder))
    assert [source.read(index) is not None for index in range(4)] == [True, True, False, False]
    assert [source.at_least(16, 16).read(index) is not None for index in range(4)] == [True, False, False, False]
    assert source.describe(3) == "0003.png"


def test_survey_tells_sizes_and_what_share_is_usable(tmp_path):
    for index in range(8):
        Image.new("RGB", (30 + index, 20)).save(tmp_path / f"{index}.png")
    (tmp_path / "8.png").write_bytes(b"")  # its header shows it
    content = (tmp_path / "7.png").read_bytes()
    (tmp_path / "7.png").write_bytes(content[:60])  # only decoding shows it
    Image.new("RGB", (9, 40)).save(tmp_path / "9.png")
    source, _ = load_sources(train_dir=str(tmp_path))
    found = source.survey()
    assert (found.num_images, found.looked_at, found.labelled) == (10, 10, False)
    assert found.usable_share == pytest.approx(8 / 10)
    assert found.median_size == (20, 33)
    assert found.smallest == (40, 9)
    assert source.at_least(16, 16).survey().smallest == (20, 30)
    assert source.count_usable(16) == 8
    assert source.at_least(16, 16).count_usable(16) == 7
    assert source.count_usable(3) == 3


def test_survey_of_tables_and_of_nothing_usable(tmp_path):
    labelled(tmp_path / "set", "train", [0, 1, 2] * 20)
    source, _ = load_sources(dataset_name=str(tmp_path / "set"))
    found = source.survey(sample=7)
    assert (found.num_images, found.looked_at, found.labelled) == (60, 7, True)
    assert (found.usable_share, found.median_size, found.smallest) == (1.0, (8, 8), (8, 8))
    nothing = source.at_least(16, 16).survey()
    assert (nothing.usable_share, nothing.median_size, nothing.smallest) == (0.0, (0, 0), (0, 0))


def test_linked_folders_are_entered_once(tmp_path, image_folder):
    folder = image_folder(2)
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "one.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "another").symlink_to(folder)
    source, _ = load_sources(train_dir=str(folder))
    assert list(source.file_names) == ["0000.png", "0001.png", "linked/one.png"]


def test_sampled_indices_span_the_source(image_folder):
    source, _ = load_sources(train_dir=str(image_folder(3)))
    assert list(source.sampled()) == [0, 1, 2]
    digits, _ = load_sources(dataset_name="digits")
    assert len(digits.sampled()) <= 64
    assert digits.sampled()[-1] > 1400


def test_folders_of_images_are_told_from_tables(tmp_path, image_folder):
    folder = image_folder(2)
    (folder / "annotations.json").write_text("{}")
    assert is_image_folder(str(folder))
    labelled(tmp_path / "set", "train", [0])
    assert not is_image_folder(str(tmp_path / "set"))
    assert not is_image_folder("some/hub-id")


def test_photographs_beside_held_out_ones_are_splits_with_their_classes(tmp_path):
    folder = tmp_path / "photographs"
    for place, colour in (("train/cat/a", 10), ("train/dog/b", 90), ("test/cat/c", 170), ("test/dog/d", 250)):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (colour, 0, 0)).save(folder / f"{place}.png")
    assert data_setting(str(folder), {}, held_out=True) == {"dataset_name": str(folder)}
    assert data_setting(str(folder), {}) == {"train_dir": str(folder)}, "to look at, all of them"
    train, test = load_sources(dataset_name=str(folder))
    assert [len(train), len(test)] == [2, 2], "held-out images are not trained on"
    assert (train.labels, test.labels) == ([0, 1], [0, 1])
    inner = str(folder / "train")
    assert data_setting(inner, {}, held_out=True) == {"train_dir": inner}, "folders of classes alone are no splits"
    (folder / "train" / "cat" / "e.tif").write_bytes(b"")
    kept = data_setting(str(folder), {}, held_out=True)
    assert kept == {"train_dir": str(folder)}, "files of science are read by channels, from a folder"


def test_folder_is_read_recursively_and_in_a_fixed_order(image_folder):
    folder = image_folder(3)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "0001.png").rename(folder / "deep" / "er" / "UPPER.PNG")
    (folder / "notes.txt").write_text("not an image")
    source, test = load_sources(train_dir=str(folder))
    assert len(source) == 3
    assert source.labels is None
    assert test is None
    again, _ = load_sources(train_dir=str(folder))
    assert again.fingerprint == source.fingerprint
    (folder / "0000.png").unlink()
    fewer, _ = load_sources(train_dir=str(folder))
    assert fewer.fingerprint != source.fingerprint


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "I;16", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 20).astype(np.uint8), (10, 1)))
    if mode == "I;16":
        ramp = Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257)
    elif mode != "CMYK":
        ramp = ramp.convert(mode)
    else:
        ramp = ramp.convert("RGB").convert(mode)
    ramp.save(tmp_path / f"image.{suffix}")
    source, _ = load_sources(train_dir=str(tmp_path))
    image = source.read(0)
    assert (image.mode, image.size) == ("RGB", (20, 10))
    greys = np.asarray(image)[5, :, 1].astype(int)
    expected = np.linspace(0, 255, 20)
    if mode == "1":  # dithered
        assert set(greys) <= {0, 255}
        assert abs(np.asarray(image).mean() - 127) < 20
    else:
        assert abs(greys - expected).max() < 12


def test_parquet_folder_with_labels(tmp_path):
    images = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(5)]
    folder = parquet_folder(
        tmp_path / "set",
        {"picture": images, "label": list(range(5)), "note": ["x"] * 5},
        {"picture": datasets.Image(), "label": datasets.Value("int64"), "note": datasets.Value("string")},
    )
    source, test = load_sources(dataset_name=str(folder))
    assert test is None
    assert source.labels == list(range(5))
    assert source.read(3).getpixel((0, 0)) == (3, 0, 0)
    assert len(source.first(2)) == 2
    assert source.first(2).labels == [0, 1]


def test_saved_datasets_are_read_too(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 4}, features=features)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        source, _ = load_sources(dataset_name=str(tmp_path / name))
        assert len(source) == 4


def test_bad_data_is_named(tmp_path, image_folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("no image")
    no_images = parquet_folder(tmp_path / "text", {"text": ["a"]}, {"text": datasets.Value("string")})
    pictures = {"left": [Image.new("RGB", (8, 8))], "right": [Image.new("RGB", (8, 8))]}
    two_columns = parquet_folder(tmp_path / "two", pictures, {"left": datasets.Image(), "right": datasets.Image()})
    cases = [
        ({"train_dir": str(tmp_path / "nowhere")}, "`train_dir`: expected a folder of images"),
        ({"train_dir": str(tmp_path / "empty")}, "found none"),
        ({"dataset_name": str(tmp_path / "empty")}, "empty or a file"),
        ({"dataset_name": str(tmp_path / "notes")}, "expected images, or parquet files that hold some, in"),
        ({"dataset_name": str(tmp_path / "nowhere")}, "does not exist"),
        ({"dataset_name": "nobody/nothing"}, "cannot load nobody/nothing"),
        ({"dataset_name": str(no_images)}, "; files of images end in .avif"),
        ({"dataset_name": str(two_columns)}, "name it with --image_column_name"),
        ({"dataset_name": str(two_columns), "image_column_name": "up"}, "got 'up'"),
        ({"dataset_name": str(two_columns), "image_column_name": "left", "label_column_name": "y"}, "got 'y'"),
        ({"dataset_name": str(two_columns), "train_split": "dev"}, "`train_split`: expected one of ['train']"),
        ({"dataset_name": str(two_columns), "test_split": "dev"}, "`test_split`: expected one of ['train']"),
    ]
    for given, message in cases:
        with pytest.raises(InputError) as error:
            load_sources(**given)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    source, _ = load_sources(dataset_name=str(two_columns), image_column_name="left")
    assert len(source) == 1


def test_digits_are_drawn_once_and_for_all():
    images, labels = digit_images()
    again, _ = digit_images()
    assert (len(images["train"]), len(images["test"])) == (1437, 360)
    assert all(image.size == (32, 32) for image in images["train"])
    assert images["test"][7].tobytes() == again["test"][7].tobytes()
    assert set(labels["test"]) == set(range(10))
    everything = {image.tobytes() for split in images.values() for image in split}
    assert len(everything) == 1797  # no image is in both splits
