"""An explorer of a real folder: what it opens and refuses, what it finds, and labels that a fine-tuning reads."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from hf_vicreg import BigBirdViTImageProcessor
from hf_vicreg.cli import main
from hf_vicreg.explore import explorer as module
from hf_vicreg.explore.explorer import Explorer, open_explorer
from hf_vicreg.explore.finds import strangeness
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import FinetuneArguments
from hf_vicreg.training.evaluation.encoder import load_vision_encoder, source_for
from hf_vicreg.training.evaluation.labelled import load_labelled
from hf_vicreg.training.prepare.arguments import embed_arguments
from hf_vicreg.training.prepare.embed import embed_images

from .conftest import BROKEN_LINE, COPIES, COUNT, smooth, write_encoder


@pytest.fixture(scope="module")
def embeddings(made_once, images, encoder):
    arguments = embed_arguments({"num_workers": 0, "inner_layers": True})
    return made_once("explored_embeddings", lambda path: embed_images(str(images), str(encoder), path, arguments))


def row_of(explorer, name):
    return next(row for row in range(len(explorer)) if explorer.images.file_name(row) == name)


def test_images_of_a_folder_are_rows_and_unreadable_ones_are_counted(explorer):
    assert len(explorer) == COUNT + COPIES + 1
    assert explorer.images.num_unreadable == 1
    assert set(explorer.analysis.maps) == {"PCA"}  # too few for a t-SNE
    names = [explorer.images.shown_name(row) for row in range(len(explorer))]
    assert not any(one in name for one in "\x07\x1b\n" for name in names)
    assert not any("broken" in name for name in names)


def test_copies_and_the_odd_one_are_found(explorer):
    found = explorer.copies()
    names = [{explorer.images.file_name(row) for row in group} for group in found.groups]
    for index in range(10, 10 + COPIES):
        assert any({f"copy_{index:03d}.png", f"sub/{index:03d}.png"} <= group for group in names)
    assert sum(found.identical) == 2 * COPIES
    assert explorer.outliers(1)[0][0] == row_of(explorer, "odd.png")
    assert sum(count for count, _ in explorer.clusters()) == len(explorer)


def test_an_image_dropped_in_finds_itself_first(explorer, images):
    row = row_of(explorer, "sub/020.png")
    (first, cosine), (second, _) = explorer.near_image((images / "sub" / "020.png").read_bytes(), 2)
    assert (first, pytest.approx(1, abs=1e-4)) == (row, cosine)
    assert explorer.near_row(row, 1)[0][0] == second
    with pytest.raises(InputError, match="not an image"):
        explorer.near_image(b"no image", 2)
    with pytest.raises(InputError, match="--caption_column"):
        explorer.near_words("a wave", 2)


def test_the_second_opening_computes_nothing_anew(explorer, images, encoder):
    (kept,) = (Path(constants.HF_HOME) / "hf_vicreg" / "explore").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    again = open_explorer(images, encoder, num_workers=0)
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == before
    np.testing.assert_array_equal(again.analysis.neighbours, explorer.analysis.neighbours)


@pytest.mark.parametrize("name", ["index.faiss", "tables.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_analysis_is_made_again(explorer, images, encoder, name, damage, caplog):
    (kept,) = (Path(constants.HF_HOME) / "hf_vicreg" / "explore").iterdir()
    file = kept / name
    file.write_bytes(file.read_bytes()[:100]) if damage == "cut" else file.unlink()
    again = open_explorer(images, encoder, num_workers=0)
    assert "is damaged and made again" in caplog.text
    np.testing.assert_array_equal(again.analysis.neighbours, explorer.analysis.neighbours)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_a_folder_of_embeddings_is_explored_with_or_without_images(explorer, embeddings, images):
    bare = open_explorer(embeddings)
    np.testing.assert_array_equal(bare.analysis.neighbours, explorer.analysis.neighbours)
    assert bare.images.key == explorer.images.key
    assert bare.picture(0, 96) is None
    with pytest.raises(InputError, match="`MODEL`"):
        bare.near_image((images / "odd.png").read_bytes(), 2)
    shown = open_explorer(embeddings, data=str(images))
    assert shown.picture(0, 96)[:2] == b"\xff\xd8"
    path, row = images / "odd.png", shown.images.paths.index("odd.png")
    moved = path.rename(path.with_suffix(".away"))
    assert shown.picture(row, 96) is None
    moved.rename(path)
    assert shown.picture(row, 96) is not None, "a disk that was away for a moment is there again"


def test_odd_ones_go_by_inner_layers_where_they_are_stored(explorer, images, encoder, tmp_path):
    inner = explorer.images.inner_layers()
    assert [one.shape for one in inner] == [(len(explorer), explorer.images.embeddings().shape[1])] * 2
    np.testing.assert_array_equal(explorer.analysis.strange, strangeness(*inner))
    embed_images(str(images), str(encoder), tmp_path / "out", embed_arguments({"num_workers": 0}))
    bare = open_explorer(tmp_path / "out")
    assert bare.images.inner_layers() == []
    np.testing.assert_array_equal(bare.analysis.strange, strangeness(bare.images.embeddings()))
    record = json.loads((tmp_path / "out" / "embedding.json").read_text()) | {"inner_layers": ["16", 16]}
    (tmp_path / "out" / "embedding.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="`IMAGES`: expected whole"):
        open_explorer(tmp_path / "out")


def test_an_encoder_of_five_channels_takes_no_photograph(embeddings, images, tmp_path):
    norm = {"image_mean": [0.5] * 5, "image_std": [0.5] * 5}
    write_encoder(tmp_path / "five", channels=5, channel_low=[0.0] * 5, channel_high=[255.0] * 5, **norm)
    bare = open_explorer(embeddings)
    of_five = Explorer(replace(bare.images, encoder=load_vision_encoder(str(tmp_path / "five"))), bare.analysis)
    with pytest.raises(InputError, match="`image`: expected images of 3 channels"):
        of_five.near_image((images / "odd.png").read_bytes(), 2)


def test_bad_input_is_told_in_one_line(embeddings, images, encoder, tmp_path, image_folder, monkeypatch, capsys):
    write_encoder(tmp_path / "other", seed=1)
    (tmp_path / "empty").mkdir()
    unfinished = shutil.copytree(embeddings, tmp_path / "unfinished")
    record = json.loads((unfinished / "embedding.json").read_text())
    del record["num_rows"]
    (unfinished / "embedding.json").write_text(json.dumps(record))
    damaged = shutil.copytree(embeddings, tmp_path / "damaged")
    (damaged / "embedding.json").write_text(json.dumps({"num_rows": COUNT + COPIES + 1, "model": {}, "images": {}}))
    for words, field in (
        ([images], "`MODEL`: expected a model to embed"),
        ([embeddings, tmp_path / "other"], "`IMAGES`: expected `weights`"),
        ([embeddings, "--data", image_folder()], "`data`: expected the images that"),
        ([images, encoder, "--data", images], "`data`: expected it beside"),
        ([tmp_path / "empty", encoder], "`IMAGES`: expected files of images in"),
        ([unfinished], "`IMAGES`: expected finished embeddings"),
        ([damaged], "`IMAGES`: expected embedding.json of"),
        ([images, encoder, "--port", "70000"], "`port`"),
        ([images, encoder, "--host", "no such host"], "`host`"),
        ([images, encoder, "--host", "a" * 64], "`host`"),
        ([images, encoder, "--host", "2001:db8::1"], "`host`"),
    ):
        assert main(["explore", *map(str, words)]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("error: "), told
        assert field in told, told
    monkeypatch.setitem(module.NEEDED, "no_such_module", "some-package")
    with pytest.raises(InputError, match=r"expected some-package; pip install 'hf-vicreg\[explore\]'"):
        open_explorer(images, encoder)


def label_all(explorer):
    return {row: "copy" if explorer.images.file_name(row).startswith("copy") else "own" for row in range(20)}


def test_labels_are_saved_as_a_fine_tuning_reads_them(explorer, images, tmp_path):
    given = label_all(explorer)
    text = explorer.labels_csv(given, 0.0)
    rows = list(csv.DictReader(io.StringIO(text.decode(), newline="")))
    assert len(rows) == len(explorer)
    assert sum(row["source"] == "given" for row in rows) == 20
    assert {f"{BROKEN_LINE}.png", "carriage\rreturn.png", "=sum,1.png"} <= {row["file_name"] for row in rows}
    (tmp_path / "labels.csv").write_bytes(text)
    arguments = FinetuneArguments(dataset_name=str(images), labels_file=str(tmp_path / "labels.csv"))
    train, test = load_labelled(arguments)
    assert train.class_names == test.class_names == ["copy", "own"]
    assert len(train.source) + len(test.source) == len(explorer)
    expected = {row["file_name"]: (row["split"], row["label"]) for row in rows}
    for split in (train, test):
        for index, label in enumerate(split.labels):
            name = split.source.describe(index)
            assert expected[name] == (split.split, split.class_names[label])
            assert split.source.read_bytes(index) == (images / name).read_bytes()
        channels = BigBirdViTImageProcessor(channel_low=[0.0] * 3, channel_high=[255.0] * 3)
        by_channel = source_for(channels, split.source)
        for index in range(0, len(by_channel), 7):
            shown = np.asarray(Image.open(images / split.source.describe(index)))
            np.testing.assert_array_equal(by_channel.read(index), shown)
    sure = explorer.labels_csv(given, 1.0).decode()
    assert "spread" not in sure


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("file_name,label\nodd.png,a\n", "row 1"),
        ("file_name,label,split\nodd.png,,train\n", "row 1"),
        ("file_name,label,split\nodd.png,a,dev\n", "row 1"),
        ("file_name,label,split\nodd.png,a,train\nodd.png,a,test\n", "row 2"),
        ("file_name,label,split\nodd.png,a,train\n", "'test'"),
        ("file_name,label,split\nodd.png,a,train\n../x.png,a,test\n", "'../x.png'"),
        ("file_name,label,split\nodd.png,a,train\nsub/003.png,b,test\n", "'b'"),
        ("file_name,label,split\nodd.png,a,train\nsub/003.png,a,test\n", "at least 2 classes"),
        ('file_name,label,split\nodd.png,"a,train\n', "CSV"),
    ],
)
def test_a_file_of_labels_that_cannot_be_is_refused(images, tmp_path, rows, told):
    (tmp_path / "labels.csv").write_text(rows)
    arguments = FinetuneArguments(dataset_name=str(images), labels_file=str(tmp_path / "labels.csv"))
    with pytest.raises(InputError, match=told):
        load_labelled(arguments)


@pytest.fixture(scope="module")
def splits(made_once):
    """A data set with as many images in either of its splits, so that a row's number says nothing of its split."""

    def make(folder):
        import datasets

        folder.mkdir()
        for split, first in (("train", 100), ("test", 200)):
            pictures = {"image": [smooth(first + index) for index in range(12)]}
            table = datasets.Dataset.from_dict(pictures, features=datasets.Features(image=datasets.Image()))
            table.to_parquet(folder / f"{split}.parquet")

    return made_once("explored_splits", make)


def test_labels_of_one_split_are_not_taken_for_those_of_another(splits, encoder, tmp_path):
    explored = open_explorer(str(splits), str(encoder), split="test", num_workers=0)
    given = {row: "even" if row % 2 == 0 else "odd" for row in range(len(explored))}
    (tmp_path / "labels.csv").write_bytes(explored.labels_csv(given, 0.0))
    flags = {"dataset_name": str(splits), "labels_file": str(tmp_path / "labels.csv")}
    with pytest.raises(
        InputError, match=r"expected row 0 of .*, found another image in split 'train'; .* --train_split"
    ):
        load_labelled(FinetuneArguments(**flags))
    train, test = load_labelled(FinetuneArguments(**flags, train_split="test"))
    for split in (train, test):
        for index, label in enumerate(split.labels):
            row = next(one for one in given if explored.images.digests[one] == split.source.digest(index))
            assert split.class_names[label] == given[row]


@pytest.mark.slow
def test_saved_labels_train_a_classifier(explorer, images, encoder, tmp_path):
    (tmp_path / "labels.csv").write_bytes(explorer.labels_csv(label_all(explorer), 0.0))
    flags = ["--dataset_name", images, "--labels_file", tmp_path / "labels.csv", "--output_dir", tmp_path / "out"]
    words = ["finetune", "classification", encoder, *flags, "--num_train_epochs", "1", "--batch_size", "16"]
    assert main([*map(str, words), "--dataloader_num_workers", "0"]) == 0
    (entry,) = json.loads((tmp_path / "out" / "results.json").read_text())["evaluations"]
    assert entry["data"]["num_train"] + entry["data"]["num_test"] == len(explorer)


def test_files_are_listed_one_a_line(explorer):
    rows = [row_of(explorer, f"{BROKEN_LINE}.png"), row_of(explorer, "odd.png")]
    first, second = explorer.files_text(rows).decode().splitlines()
    assert json.loads(first) == f"{BROKEN_LINE}.png"
    assert second == "odd.png"
