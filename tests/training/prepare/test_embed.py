"""`hf-vicreg embed`: one row an image, the same whatever the processes and the kills; and what it refuses."""

import json
import os
import random
import re
import signal
import sys
import time
from io import BytesIO

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import hf_vicreg
from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_vision_encoder
from hf_vicreg.training.images import decoding
from hf_vicreg.training.images.sources import load_sources
from hf_vicreg.training.prepare import embed as module

# so narrow that the last bits of matrix products depend on threads
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VIT = SHAPE | {"image_size": 32, "patch_size": 8}
OURS = VIT | {"tile_size": 2, "num_register_tokens": 3}  # tiles: not raster inside
SMALL_SHARDS = """
import sys
from hf_vicreg.training.prepare import embed
embed.IMAGES_A_SHARD = int(sys.argv.pop(1))
from hf_vicreg.cli import main
sys.exit(main(sys.argv[1:]))
"""


def save_model(folder, kind="ours", seed=0):
    torch.manual_seed(seed)
    if kind == "ours":
        BigBirdViTModel(BigBirdViTConfig(**OURS)).save_pretrained(folder)
        BigBirdViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        return folder
    if kind == "vit":
        model = ViTModel(ViTConfig(**VIT))
    elif kind == "dinov2":
        sizes = {key: value for key, value in VIT.items() if key != "intermediate_size"}
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes))
    elif kind == "swin":
        model = SwinModel(
            SwinConfig(image_size=32, patch_size=4, embed_dim=8, window_size=2, depths=[1, 1], num_heads=[1, 1])
        )
    else:
        model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "IMAGES_A_SHARD", 8)


def images(folder, count, size=(36, 30)):
    folder.mkdir()
    generator = np.random.default_rng(count)
    for index in range(count):
        pixels = generator.integers(0, 256, (size[1] + index % 3, size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.png")
    return folder


def rows(out):
    return datasets.load_dataset(str(out), split="train").with_format("numpy")


def shards(out):
    return {path.name: path.read_bytes() for path in (out / "data").glob("*.parquet")}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_by_one(model, source, indices):
    """Outputs of the model for each image alone, by hand."""
    encoder = load_vision_encoder(str(model))
    with torch.no_grad():
        pixels = [encoder.processor(source.read(index), return_tensors="pt")["pixel_values"] for index in indices]
        return [encoder.model(pixel_values=one) for one in pixels]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_are_those_of_a_loop_over_the_images_in_their_order(tmp_path, model, small_shards, capsys, num_workers):
    folder, out = images(tmp_path / "images", 20), tmp_path / "out"
    (folder / "00009.png").write_bytes(b"broken")
    (folder / "00012.png").unlink()
    (folder / "00012.png").symlink_to(tmp_path / "nowhere")
    flags = ["--batch_size", "3", "--num_workers", str(num_workers)]
    assert main(["embed", str(folder), str(model), str(out), *flags]) == 0
    assert "18 images embedded, 2 unreadable left out" in capsys.readouterr().out
    assert sorted(shards(out)) == [f"train-0000{shard}-of-00003.parquet" for shard in range(3)]
    found, source = rows(out), load_sources(train_dir=str(folder))[0]
    expected = [index for index in range(20) if index not in (9, 12)]
    assert list(found["id"]) == expected
    assert list(found["path"]) == [source.file_names[index] for index in expected]
    assert found.features["height"].dtype == found.features["width"].dtype == "int32"
    assert [tuple(one) for one in zip(found["height"], found["width"], strict=True)] == [
        source.read(index).size[::-1] for index in expected
    ]
    plain = torch.cat([one.pooler_output for one in one_by_one(model, source, expected)])
    torch.testing.assert_close(torch.tensor(np.stack(found["embedding"])), plain, rtol=1e-4, atol=1e-6)
    assert found.features["embedding"] == datasets.List(datasets.Value("float32"), length=16)
    unusable = [json.loads(line) for line in (out / "unusable.jsonl").read_text().splitlines()]
    assert [(one["index"], one["kind"]) for one in unusable] == [(9, "not an image"), (12, "missing")]
    record = json.loads((out / "embedding.json").read_text())
    assert (record["num_rows"], record["num_unusable"], record["model"]["name"]) == (18, 2, "model")
    assert str(tmp_path) not in "".join(map(str, files(out).values()))  # where it lies is nobody's business


def test_loader_processes_change_no_bit(tmp_path, small_shards):
    folder, model = images(tmp_path / "images", 20), save_model(tmp_path / "model", "vit")
    for workers in (0, 1, 2):
        hf_vicreg.embed(folder, model, tmp_path / str(workers), num_workers=workers, batch_size=4)
    assert shards(tmp_path / "0") == shards(tmp_path / "1") == shards(tmp_path / "2")


@pytest.mark.parametrize("kind", ["ours", "vit", "dinov2", "resnet"])
def test_patch_tokens_are_the_last_hidden_state_in_raster_order(tmp_path, kind):
    folder, model = images(tmp_path / "images", 3), save_model(tmp_path / "model", kind)
    found = hf_vicreg.embed(folder, model, tmp_path / "out", patch_tokens=True, num_workers=0).with_format("torch")
    source = load_sources(train_dir=str(folder))[0]
    for row, outputs in zip(found, one_by_one(model, source, range(3)), strict=True):
        states = outputs.last_hidden_state[0]
        leading = {"ours": 4, "vit": 1, "dinov2": 5}.get(kind)
        if leading is None:
            expected = states.permute(1, 2, 0)
        else:
            expected = torch.stack([states[leading + 4 * line : leading + 4 * line + 4] for line in range(4)])
        assert row["patch_tokens"].shape == expected.shape
        torch.testing.assert_close(row["patch_tokens"].float(), expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(row["embedding"], outputs.pooler_output.flatten(), rtol=1e-4, atol=1e-5)
    kind = found.features["patch_tokens"]
    assert (kind.length, kind.feature.length, kind.feature.feature.length) == tuple(expected.shape)
    assert kind.feature.feature.feature.dtype == "float16"


def test_float16_is_float32_rounded(tmp_path, model):
    folder = images(tmp_path / "images", 5)
    full = hf_vicreg.embed(folder, model, tmp_path / "full").with_format("numpy")
    half = hf_vicreg.embed(folder, model, tmp_path / "half", dtype="float16")
    assert half.features["embedding"].feature.dtype == "float16"
    rounded = np.stack(full["embedding"]).astype("float16")
    np.testing.assert_array_equal(np.stack(half.with_format("numpy")["embedding"]), rounded)


def test_values_beyond_float16_or_not_finite_are_refused(tmp_path):
    folder, place = images(tmp_path / "images", 3), tmp_path / "model"
    for scale, message in (
        (1e6, "`dtype`: expected embeddings within the range of float16"),
        (float("nan"), "finite"),
    ):
        torch.manual_seed(0)
        network = BigBirdViTModel(BigBirdViTConfig(**OURS))
        with torch.no_grad():
            network.layernorm.weight.mul_(scale)
        network.save_pretrained(place)
        with pytest.raises(InputError, match=message):
            hf_vicreg.embed(folder, place, tmp_path / f"out{scale}", dtype="float16")
        assert not shards(tmp_path / f"out{scale}")


def labelled(folder, count=24):
    """A data set of `count` training and 8 test images of two classes."""
    folder.mkdir()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    generator = np.random.default_rng(0)
    for split, length in (("train", count), ("test", 8)):
        pixels = [
            generator.integers(0, 128, (30, 30, 3), dtype=np.uint8) + 64 * (index % 2) for index in range(length)
        ]
        pictures = [Image.fromarray(one.astype(np.uint8)) for one in pixels]
        content = {"img": pictures, "label": [index % 2 for index in range(length)]}
        datasets.Dataset.from_dict(content, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def test_labels_and_their_names_are_kept_of_a_data_set_a_file_and_folders_of_classes(tmp_path, model):
    data = labelled(tmp_path / "data")
    sources = [(data, {"split": "test"}), (data / "test.parquet", {})]
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "classes" / split / name).mkdir(parents=True)
    for index, row in enumerate(datasets.load_dataset(str(data), split="test")):
        row["img"].save(tmp_path / "classes" / "test" / ["cat", "dog"][row["label"]] / f"{index}.png")
        row["img"].save(tmp_path / "classes" / "train" / ["cat", "dog"][row["label"]] / f"{index}.png")
    sources.append((tmp_path / "classes", {"split": "test"}))
    for number, (place, flags) in enumerate(sources):
        found = hf_vicreg.embed(place, model, tmp_path / f"out{number}", **flags)
        assert found.features["label"] == datasets.ClassLabel(names=["cat", "dog"])
        assert found["label"][:] == ([0, 1] * 4 if number < 2 else [0] * 4 + [1] * 4)
        assert found["path"][2] == "row 2"
    plain = hf_vicreg.embed(tmp_path / "classes", model, tmp_path / "plain")  # as pretraining sees that folder
    assert "label" not in plain.features
    assert plain["path"][0] == os.path.join("test", "cat", "0.png")


def test_without_a_folder_the_cache_has_it_the_second_time(tmp_path, model, monkeypatch, caplog):
    monkeypatch.setattr(module.constants, "HF_HOME", str(tmp_path / "home"))
    folder = images(tmp_path / "images", 5)
    first = hf_vicreg.embed(folder, model)
    (place,) = (tmp_path / "home" / "hf_vicreg" / "features").iterdir()
    with caplog.at_level("INFO", logger="hf_vicreg"):
        assert hf_vicreg.embed(str(folder), str(model))["embedding"][:] == first["embedding"][:]
    assert "is finished: nothing to do" in caplog.text
    Image.new("RGB", (30, 30)).save(folder / "00003.png")  # other images: another folder, no refusal
    assert hf_vicreg.embed(folder, model)["embedding"][3] != first["embedding"][3]
    assert len(list(place.parent.iterdir())) == 2


def test_names_that_are_no_text_and_images_decoded_smaller(tmp_path, model, monkeypatch):
    folder = images(tmp_path / "images", 1)
    os.rename(folder / "00000.png", os.fsencode(folder) + b"/0\xff.png")
    Image.new("RGB", (400, 300), (200, 30, 90)).save(folder / "large.jpg")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 50_000)
    monkeypatch.setattr("hf_vicreg.training.prepare.embedding_batches.MAX_PIXELS", 50_000)
    found = hf_vicreg.embed(folder, model, tmp_path / "out")
    assert found["path"][:] == ["0�.png", "large.jpg"]
    assert (found["height"][1], found["width"][1]) == (300, 400)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "launcher", ["torchrun", *(pytest.param(one, marks=pytest.mark.slow) for one in ("own", "accelerate"))]
)
def test_two_processes_give_the_rows_of_one(tmp_path, model, run_process, ranks, launcher, free_port):
    folder = images(tmp_path / "images", 2_200, size=(12, 10))
    (folder / "01200.png").write_bytes(b"")
    hf_vicreg.embed(folder, model, tmp_path / "one", patch_tokens=True)
    words = ["-m", "hf_vicreg.cli", "embed", folder, model, tmp_path / "two", "--patch_tokens"]
    # accelerate's own way to several processes on one machine; without CUDA they run on the CPU
    options = ["--multi_gpu", "--num_processes", 2, "--main_process_port", free_port]
    command = {
        "own": [*words, "--num_processes", 2],
        "accelerate": ["-m", "accelerate.commands.launch", *options, *words],
    }
    if launcher == "torchrun":  # the environment that it gives
        finished = ranks(2, *words)
    else:
        finished = run_process([sys.executable, *command[launcher]], PYTHONWARNINGS="ignore")
    assert finished.returncode == 0, finished.stderr
    assert "device cpu, 2 process(es), " in finished.stderr
    assert finished.stdout.count("2,199 images embedded, 1 unreadable left out") == 1
    assert len(shards(tmp_path / "one")) == 3
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
    for name in ("embedding.json", "unusable.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def kill_and_go_on(command, out, run_process, kills, most):
    """Start a command, kill it behind a random number of shards, and again; then let it end."""
    moments = random.Random(0)
    for _ in range(kills):
        before = len(list((out / "data").glob("train-*")))
        wanted = before + moments.randint(1, most)
        process = run_process.start(command, PYTHONWARNINGS="ignore")
        deadline = time.monotonic() + 200
        while len(list((out / "data").glob("train-*"))) < wanted:
            assert time.monotonic() < deadline, "no shard in time"
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        time.sleep(moments.random() * 0.05)
        assert process.poll() is None, "it was to be killed, and has ended"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    finished = run_process(command, timeout_s=500, PYTHONWARNINGS="ignore")
    assert finished.returncode == 0, finished.stderr
    assert "shards are there already" in finished.stderr
    assert re.search(r"image \d+/\d+, 00:\d\d left", finished.stderr)  # of a bar, where output goes to a file
    return finished


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_rows_of_an_undisturbed_run(tmp_path, model, small_shards, run_process):
    folder = images(tmp_path / "images", 400)
    (folder / "00100.png").write_bytes(b"broken")
    hf_vicreg.embed(folder, model, tmp_path / "undisturbed", batch_size=2)
    script, out = tmp_path / "small_shards.py", tmp_path / "out"
    script.write_text(SMALL_SHARDS)
    command = [sys.executable, script, 8, "embed", folder, model, out, "--batch_size", 2, "--num_workers", 1]
    kill_and_go_on(command, out, run_process, 3, 10)
    assert len(shards(out)) == 50
    assert shards(out) == shards(tmp_path / "undisturbed")
    assert list(rows(out)["id"]) == [index for index in range(400) if index != 100]
    assert {path.name for path in out.iterdir()} == {"data", "embedding.json", "unusable.jsonl"}
    assert {path.suffix for path in (out / "data").iterdir()} == {".parquet"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_killed_five_times_on_20000_images(tmp_path, model, run_process, processes):
    folder = images(tmp_path / "images", 20_000, size=(12, 10))
    hf_vicreg.embed(folder, model, tmp_path / "undisturbed", batch_size=16)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hf_vicreg.cli", "embed", folder, model, out, "--batch_size", 16]
    # of several processes the one that started them is killed: the others notice that they are alone
    kill_and_go_on([*command, "--num_processes", processes], out, run_process, 5, 2)
    assert len(shards(out)) == 20
    assert shards(out) == shards(tmp_path / "undisturbed")
    assert list(rows(out)["id"]) == list(range(20_000))


@pytest.mark.slow
def test_asked_to_stop_it_leaves_and_goes_on(tmp_path, model, run_process, small_shards):
    folder, out = images(tmp_path / "images", 300), tmp_path / "out"
    script = tmp_path / "small_shards.py"
    script.write_text(SMALL_SHARDS)
    command = [sys.executable, script, 8, "embed", folder, model, out, "--batch_size", 1, "--num_workers", 1]
    process = run_process.start(command, PYTHONWARNINGS="ignore")
    deadline = time.monotonic() + 200
    while not (out / "data" / "train-00002-of-00038.parquet").exists():
        assert time.monotonic() < deadline, "no shard in time"
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does, the loader process with it
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "stopped by SIGTERM; the same command goes on" in said
    assert "Traceback" not in said
    assert len(hf_vicreg.embed(folder, model, out, batch_size=1)) == 300


def test_killed_before_it_said_what_it_makes_it_begins_again(tmp_path, model):
    folder, out = images(tmp_path / "images", 3), tmp_path / "out"
    out.mkdir()
    (out / ".writing_1_embedding.json").write_text("{")
    assert len(hf_vicreg.embed(folder, model, out)) == 3
    assert {path.name for path in out.iterdir()} == {"data", "embedding.json"}


def test_labels_changed_between_two_calls_are_refused(tmp_path, model):
    data = labelled(tmp_path / "data")
    hf_vicreg.embed(data, model, tmp_path / "out")
    path = data / "train.parquet"
    table = pyarrow.parquet.read_table(path)
    labels = pyarrow.array([1] * len(table), table["label"].type)
    pyarrow.parquet.write_table(table.set_column(1, table.field(1), labels), path)
    with pytest.raises(InputError, match="`OUT`: expected `labels` "):
        hf_vicreg.embed(data, model, tmp_path / "out")


REFUSED = {
    "model": "`weights`",
    "processor": "`height` 40 in ",
    "byte": "found that of another one in place of 00013.png, which was changed since",
    "fewer": "`num_images` 19",
    "dtype": "`dtype` 'float16' in ",
    "tokens": "`patch_tokens` [4, 4, 16] in ",
    "damaged": "expected a whole shard in ",
    "foreign": "`OUT`: expected a new folder or one with embedding.json",
    "file": "which is a file",
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "begun"])
def test_a_folder_of_another_model_or_other_images_is_refused(tmp_path, model, small_shards, capsys, case, finished):
    folder, out = images(tmp_path / "images", 20), tmp_path / "out"
    words = ["embed", str(folder), str(model), str(out), "--num_workers", "0"]
    assert main(words) == 0
    if not finished:
        (out / "data" / "train-00000-of-00003.parquet").unlink()
        (out / "embedding.json").write_text(
            json.dumps({k: v for k, v in json.loads((out / "embedding.json").read_text()).items() if k[:4] != "num_"})
        )
    if case == "model":
        save_model(model, seed=1)
    elif case == "processor":
        processor = json.loads((model / "preprocessor_config.json").read_text())
        (model / "preprocessor_config.json").write_text(json.dumps(processor | {"size": {"height": 40, "width": 40}}))
    elif case == "byte":  # not one of those that the source's own fingerprint looks at, in a larger set
        Image.new("RGB", (36, 31)).save(folder / "00013.png")
        record = json.loads((out / "embedding.json").read_text())
        record["images"]["fingerprint"] = load_sources(train_dir=str(folder))[0].fingerprint
        (out / "embedding.json").write_text(json.dumps(record))
    elif case == "fewer":
        (folder / "00013.png").unlink()
    elif case == "dtype":
        words += ["--dtype", "float16"]
    elif case == "tokens":
        words += ["--patch_tokens"]
    elif case == "damaged":
        (out / "data" / "train-00001-of-00003.parquet").write_bytes(b"PAR1")
    elif case == "foreign":
        (out / "embedding.json").unlink()
    else:
        words[3] = str(folder / "00000.png")
    before = files(tmp_path)
    capsys.readouterr()
    assert main(words) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert REFUSED[case] in line
    assert "another" in line or "again" in line  # the remedy
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch": 3}, "`batch`: unknown flag; did you mean `batch_size`"),
        ({"batch_size": 0}, "`batch_size`: expected an integer of at least 1"),
        ({"num_workers": -1}, "`num_workers`: expected an integer of at least 0"),
        ({"dtype": "bfloat16"}, "`dtype`: expected one of float32, float16"),
        ({"split": "nosuch"}, "`split`: expected one of "),
        ({"device": "cuda"}, "`device`: expected one that this machine has"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_bad_flags_are_refused_and_nothing_is_made(tmp_path, model, flags, message):
    with pytest.raises(InputError, match=message):
        hf_vicreg.embed("digits", model, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["vit", "swin", "resnet"])
def test_inner_layers_are_the_mean_hidden_states_at_a_third_and_two_thirds(tmp_path, kind):
    folder, model = images(tmp_path / "images", 3), save_model(tmp_path / "model", kind)
    found = hf_vicreg.embed(folder, model, tmp_path / "out", inner_layers=True, num_workers=0).with_format("torch")
    source, encoder = load_sources(train_dir=str(folder))[0], load_vision_encoder(str(model))
    for index, row in enumerate(found):
        pixels = encoder.processor(source.read(index), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            states = encoder.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        layers = len(states) - 1
        chosen = [states[max(1, round(layers / 3))][0], states[max(1, round(2 * layers / 3))][0]]
        means = [one.mean(0) if one.ndim == 2 else one.mean((1, 2)) for one in chosen]
        torch.testing.assert_close(row["inner_layers"], torch.cat(means), rtol=1e-4, atol=1e-5)
    record = json.loads((tmp_path / "out" / "embedding.json").read_text())
    assert record["inner_layers"] == [len(one) for one in means]
    with pytest.raises(InputError, match="`inner_layers` None in"):
        hf_vicreg.embed(folder, model, tmp_path / "out", num_workers=0)


def test_no_images_no_readable_ones_and_no_patch_tokens(tmp_path, model):
    with pytest.raises(InputError, match="`data`: expected a folder of images"):
        hf_vicreg.embed(tmp_path / "nowhere", model, tmp_path / "out")
    folder = images(tmp_path / "images", 2)
    swin = save_model(tmp_path / "swin", "swin")
    with pytest.raises(InputError, match="`patch_tokens`: expected a model with a token for each patch"):
        hf_vicreg.embed(folder, swin, tmp_path / "out", patch_tokens=True)
    assert not (tmp_path / "out").exists()
    for path in folder.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"none of 2 can be read; 0000.*png: not an image"):
        hf_vicreg.embed(folder, model, tmp_path / "out")


def test_evaluation_from_embeddings_is_evaluation_from_images(tmp_path, model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    labelled(tmp_path / "data")
    for split in ("train", "test"):
        hf_vicreg.embed("data", model, tmp_path / split, split=split)
    knn = ["evaluate", "knn", "model", "--dataset_name", "data", "--neighbours", "1", "5"]
    assert main([*knn, "--cache_dir", "cache", "--output_dir", "images"]) == 0
    read = ["--cache_dir", "unused", "--embeddings", "train", "test"]
    assert main([*knn, *read, "--output_dir", "embeddings"]) == 0
    assert main([*knn, *read[:-1], "--output_dir", "half", "--max_train_samples", "20"]) == 0  # test images encoded
    from_images, from_embeddings = (
        json.loads((tmp_path / name / "results.json").read_text())["evaluations"][0]
        for name in ("images", "embeddings")
    )
    for key in ("metrics", "model", "data", "settings", "details"):
        assert from_embeddings[key] == from_images[key], key
    assert not (tmp_path / "unused" / "train").exists()

    for folders, message in (
        (["test", "train"], "found 8, of which image 0 is another one or missing"),
        (["data"], "`embeddings`: expected a new folder or one with embedding.json"),
        (["train", "test", "test"], "got 3"),
    ):
        capsys.readouterr()
        assert main([*knn, "--embeddings", *folders, "--output_dir", "refused"]) == 2
        assert message in capsys.readouterr().err
    save_model(tmp_path / "model", seed=1)
    assert main([*knn, "--embeddings", "train", "test", "--output_dir", "refused"]) == 2
    assert "`embeddings`: expected `weights`" in capsys.readouterr().err
    assert not (tmp_path / "refused" / "results.json").exists()


def test_evaluation_takes_no_image_for_another(tmp_path, model, monkeypatch, capsys):
    """Of the same set with one image changed, every byte is looked at."""
    monkeypatch.chdir(tmp_path)
    labelled(tmp_path / "data")
    hf_vicreg.embed("data", model, tmp_path / "train")
    table = pyarrow.parquet.read_table(tmp_path / "data" / "train.parquet")
    entries, buffer = table["img"].to_pylist(), BytesIO()
    Image.new("RGB", (30, 30)).save(buffer, "PNG")
    entries[17]["bytes"] = buffer.getvalue()
    changed = table.set_column(0, table.field(0), [pyarrow.array(entries, table.field(0).type)])
    pyarrow.parquet.write_table(changed, tmp_path / "data" / "train.parquet")
    assert main(["evaluate", "knn", "model", "--dataset_name", "data", "--embeddings", "train"]) == 2
    assert "image 17 is another one" in capsys.readouterr().err
