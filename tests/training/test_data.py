"""Sources, order and substitution of corrupt images."""

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_vicreg.training.config import ViewsConfig
from hf_vicreg.training.data import StepSampler, ViewDataset, collate, load_sources
from hf_vicreg.training.digits import digit_images
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.views import ViewSampler


def parquet_folder(path, columns, features):
    path.mkdir()
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path / "train.parquet")
    return path


def views_of(source, workers=0, first_step=0, rank=0, world_size=1, steps=6, batch_size=8):
    dataset = ViewDataset(source, ViewSampler(ViewsConfig(), (16, 16)), seed=3)
    sampler = StepSampler(len(source), batch_size, 3, first_step, steps, rank, world_size)
    return list(DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate))


def test_order_of_each_epoch_is_a_permutation():
    keys = [key for batch in StepSampler(20, 4, 0, 0, 10, 0, 1) for key in batch]
    for epoch in range(2):
        assert sorted(index for which, index in keys if which == epoch) == list(range(20))
    assert keys[:20] != [(0, index) for _, index in keys[20:]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batches_are_the_same_images_whatever_the_world_size(world_size):
    whole = list(StepSampler(22, 8, 1, 0, 5, 0, 1))
    shares = [list(StepSampler(22, 8, 1, 0, 5, rank, world_size)) for rank in range(world_size)]
    for step in range(5):
        assert [key for share in shares for key in share[step]] == whole[step]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
@pytest.mark.parametrize("workers", [0, 2])
def test_samples_depend_on_their_key_alone(image_folder, workers):
    source, _ = load_sources(train_dir=str(image_folder(20)))
    whole = views_of(source)
    resumed = views_of(source, workers=workers, first_step=3)
    halves = [views_of(source, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3, 6):
        assert torch.equal(resumed[step - 3]["views"], whole[step]["views"])
        assert torch.equal(resumed[step - 3]["colours"], whole[step]["colours"])
        assert torch.equal(torch.cat([half[step]["views"] for half in halves]), whole[step]["views"])
    assert not torch.equal(whole[0]["views"][:, 0], whole[0]["views"][:, 1])


def test_corrupt_images_are_replaced_and_counted(image_folder):
    folder = image_folder(20)
    good = folder / "0003.png"
    content = good.read_bytes()
    bad = {4: content[:80], 5: b"", 11: b"not an image at all"}
    for index, data in bad.items():
        (folder / f"{index:04d}.png").write_bytes(data)
    source, _ = load_sources(train_dir=str(folder))
    batches = views_of(source, steps=4, batch_size=10)  # two epochs, every image
    assert {index for batch in batches for index in batch["corrupt"]} == set(bad)
    assert all(batch["views"].shape == (10, 2, 3, 16, 16) for batch in batches)


def test_all_corrupt_gives_no_views(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_bytes(b"x")
    source, _ = load_sources(train_dir=str(tmp_path))
    assert views_of(source, steps=1, batch_size=2)[0]["views"] is None


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
    Image.new(mode, (20, 10)).save(tmp_path / f"image.{suffix}")
    source, _ = load_sources(train_dir=str(tmp_path))
    image = source.read(0)
    assert (image.mode, image.size) == ("RGB", (20, 10))


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
    no_images = parquet_folder(tmp_path / "text", {"text": ["a"]}, {"text": datasets.Value("string")})
    pictures = {"left": [Image.new("RGB", (8, 8))], "right": [Image.new("RGB", (8, 8))]}
    two_columns = parquet_folder(tmp_path / "two", pictures, {"left": datasets.Image(), "right": datasets.Image()})
    cases = [
        ({"train_dir": str(tmp_path / "nowhere")}, "`train_dir`: expected a folder of images"),
        ({"train_dir": str(tmp_path / "empty")}, "found none"),
        ({"dataset_name": str(tmp_path / "empty")}, "empty or a file"),
        ({"dataset_name": str(tmp_path / "nowhere")}, "does not exist"),
        ({"dataset_name": "nobody/nothing"}, "cannot load nobody/nothing"),
        ({"dataset_name": str(no_images)}, "expected one image column in"),
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
