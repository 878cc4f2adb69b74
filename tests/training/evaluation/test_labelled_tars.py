"""Labelled images of tars: those that are in them, with the classes beside them, by whatever way they are read."""

import io
import json
import pickle
import tarfile

import pytest
from PIL import Image

from hf_vicreg.cli import main
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import KnnArguments
from hf_vicreg.training.evaluation.labelled import load_labelled
from hf_vicreg.training.images.files.labelled_tars import labelled_tars
from hf_vicreg.training.images.files.shards import members
from tests.training.images.shard_server import served


def encoded(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 7 % 256, number * 13 % 256, number)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, samples):
    """Write members by name, of each sample a dictionary from suffix to content, in its order."""
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for suffix, content in parts.items():
                content = content if isinstance(content, bytes) else content.encode()
                header = tarfile.TarInfo(f"{key}.{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


def sample(number, kind, value):
    content = str(value) if kind == "cls" else json.dumps({"label": value, "text": "x"})
    parts = {kind: content, "png": encoded(number)}
    # the class before its image, and behind it
    return f"a.b/{number:03d}", parts if number % 2 else dict(reversed(parts.items()))


@pytest.fixture
def tars(tmp_path):
    """Returns a function that writes two training tars and one for testing, and returns the flags that name them."""

    def write(kind, train, test, **flags):
        half = len(train) // 2
        for name, numbers, values in (
            ("train-0", range(half), train),
            ("train-1", range(half, len(train)), train[half:]),
            ("test-0", range(100, 100 + len(test)), test),
        ):
            samples = [sample(number, kind, value) for number, value in zip(numbers, values, strict=False)]
            write_tar(tmp_path / f"{name}.tar", samples)
        return KnnArguments(
            dataset_name=str(tmp_path / "train-*.tar"), test_split=str(tmp_path / "test-{0..0}.tar"), **flags
        )

    return write


@pytest.mark.parametrize(
    ("kind", "train", "test", "names", "labels"),
    [
        ("cls", [2, 0, 1, 2, 0], [1, 2], ["0", "1", "2"], ([2, 0, 1, 2, 0], [1, 2])),
        ("cls", ["owl", "cat", "owl"], ["cat"], ["cat", "owl"], ([1, 0, 1], [0])),
        ("json", ["owl", "cat", "owl"], ["cat"], ["cat", "owl"], ([1, 0, 1], [0])),
        ("json", [1, 0, 1], [0], ["0", "1"], ([1, 0, 1], [0])),
    ],
    ids=["cls-numbers", "cls-names", "json-names", "json-numbers"],
)
def test_images_and_classes_are_those_of_the_tars(tars, tmp_path, kind, train, test, names, labels):
    found = load_labelled(tars(kind, train, test))
    assert ([one.labels for one in found], found[0].class_names) == (list(labels), names)
    assert [one.split for one in found] == ["train-*.tar", "test-{0..0}.tar"]
    # read as training streams them
    streamed = [one.content for name in ("train-0", "train-1") for one in members(str(tmp_path / f"{name}.tar"))]
    source = pickle.loads(pickle.dumps(found[0].source))
    assert [source.read_bytes(index) for index in range(len(source))] == streamed
    assert streamed == [encoded(number) for number in range(len(train))]
    assert found[0].source.describe(len(train) - 1) == f"train-1.tar/a.b/{len(train) - 1:03d}.png"
    chosen = found[0].select([2, 0])
    assert ([chosen.source.read_bytes(0), chosen.labels[1]]) == [streamed[2], labels[0][0]]


def test_tars_of_a_store_that_fails_are_read_as_those_of_a_disk(tars, tmp_path):
    flags = tars("cls", [2, 0, 1], [1])
    source, classes = labelled_tars(flags.dataset_name, "dataset_name", "label")
    with served(tmp_path, drop_every=3) as store:
        away, same = labelled_tars(f"{store.address}/train-{{0..1}}.tar", "dataset_name", "label")
        assert [away.read_bytes(index) for index in range(3)] == [source.read_bytes(index) for index in range(3)]
        assert store.dropped > 0
    assert (same, away.fingerprint) == (classes, source.fingerprint)
    (tmp_path / "train-0.tar").unlink()
    with pytest.raises(OSError, match=r"train-0\.tar"):
        source.read_bytes(0)


def test_a_named_field_is_of_json_alone(tmp_path):
    parts = {"png": encoded(0), "cls": "5", "json": json.dumps({"species": "owl"})}
    write_tar(tmp_path / "0.tar", [("0", parts)])
    assert labelled_tars(str(tmp_path / "0.tar"), "dataset_name", "species")[1] == ["owl"]
    for order in (parts, dict(reversed(parts.items()))):
        order["json"] = json.dumps({"species": "owl", "label": 7})
        write_tar(tmp_path / "1.tar", [("0", order), ("._0", {"png": b"of another system"})])
        assert labelled_tars(str(tmp_path / "1.tar"), "dataset_name", "label")[1] == [5], "`.cls` goes first"


@pytest.mark.parametrize(
    ("train", "test", "flags", "message"),
    [
        (
            [0, 1],
            [0, 5],
            {},
            r"`label_column_name`: expected one of the 2 classes .* split 'test-\{0..0\}.tar', got 5",
        ),
        ([0, "owl"], [0], {}, "`dataset_name`: expected classes .* all whole numbers or all names, got 0"),
        ([0, None], [0], {}, r"`dataset_name`: expected a class beside each image, .* found none beside a.b/001.png"),
        ([0, 1], [0], {"label_column_name": "species"}, "'species' in NAME.json, found none beside a.b/000.png of tr"),
        ([1, 1], [1], {}, "`label_column_name`: expected at least 2 classes"),
        ([0, 10**11], [0], {}, "`dataset_name`: expected classes below 1,000,000, found 100000000000"),
    ],
)
def test_what_cannot_be_a_class_is_refused(tars, train, test, flags, message):
    with pytest.raises(InputError, match=message):
        load_labelled(tars("json", train, test, **flags))


def test_shards_that_cannot_be_evaluated_on_are_refused(tars, tmp_path, capsys):
    flags = tars("cls", [0, 1, 0, 1], [0])
    name, test = flags.dataset_name, flags.test_split
    content = (tmp_path / "train-1.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:1700])
    write_tar(tmp_path / "none.tar", [("0", {"cls": "1"})])
    for given, message in (
        ((name, None), "`test_split`: expected tars, others to test on"),
        ((name, name), "`test_split`: expected tars, others to test on"),
        (("x/*.parquet", test), "`dataset_name`: expected tars"),
        ((name, str(tmp_path / "absent.tar")), "`test_split`: expected tars that can be read, absent.tar cannot be: "),
        ((str(tmp_path / "cut.tar"), test), "`dataset_name`: expected tars that can be read, cut.tar cannot be: "),
        ((str(tmp_path / "none.tar"), test), "`dataset_name`: expected images in "),
        ((name, str(tmp_path / "tset-*.tar")), "`test_split`: expected shards, found none by"),
        (("https://store/0.tar?signature=secret", test), "`dataset_name`: expected an address of shards without"),
        (("s3://me:secret@bucket/0.tar", test), "`dataset_name`: expected an address of shards without credentials"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_labelled(KnnArguments(dataset_name=given[0], test_split=given[1]))
        assert "secret" not in str(caught.value)
    command = ["evaluate", "knn", "cifar10_cpu", "--dataset_name", name, "--output_dir", str(tmp_path / "out")]
    assert main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_is_evaluated_on_tars(tars, tmp_path):
    flags = tars("cls", [0, 1] * 6, [0, 1, 0])
    places = ["--dataset_name", flags.dataset_name, "--test_split", flags.test_split, "--neighbours", "1", "5"]
    assert main(["evaluate", "knn", "digits", *places, "--output_dir", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "results.json").read_text()
    data = json.loads(text)["evaluations"][0]["data"]
    assert (data["dataset"], data["num_train"], data["num_test"]) == ("train-*.tar", 12, 3)
    assert str(tmp_path) not in text
