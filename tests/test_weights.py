"""The encoders that come with the package: they load, and are worth what their cards say."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import hf_vicreg
from hf_vicreg.cli import main
from hf_vicreg.model_cards.shipped import located
from hf_vicreg.weights import FOLDER, names

CIFAR10 = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"
NUCLEI = CIFAR10.with_name("nuclei")
# k-NN of the card, its images and how many of them; the large one takes half a minute
MEASURED = {
    "digits": ("digits", []),
    **dict.fromkeys(
        ("cifar10_cpu", "cifar10_cpu_long"),
        (str(CIFAR10), ["--max_train_samples", "10000", "--max_test_samples", "2000"]),
    ),
}
LARGEST = 6_000_000  # bytes of weights that a repository carries without complaint


def test_every_encoder_is_small_has_a_card_and_loads_both_ways():
    assert set(names()) == {*MEASURED, "nuclei"}, "each has its figure measured below"
    for name in names():
        folder = FOLDER / name
        assert (folder / "model.safetensors").stat().st_size <= LARGEST
        model, same = hf_vicreg.load(name), AutoModel.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(model.name_or_path)
        images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
        inputs = processor(images=images, return_tensors="pt")
        assert not model.training
        assert model.dtype == same.dtype == torch.float32, "weights may be stored in half precision, and load in full"
        assert torch.equal(model(**inputs).pooler_output, same.eval()(**inputs).pooler_output)
        results = json.loads((folder / "results.json").read_text())
        dense = [one["metrics"]["knn_dice"] for one in results.get("evaluations", []) if one["task"] == "dense"]
        trained = results["knn_accuracy"].get("trained") or dense[0]
        assert f"{trained:.3f}" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one != "digits")) for one in MEASURED])
def test_an_encoder_has_the_accuracy_of_its_card(name, tmp_path):
    data, flags = MEASURED[name]
    if name.startswith("cifar10") and not CIFAR10.is_dir():
        pytest.skip("needs the images of CIFAR-10 in ../shared/data/cifar10")
    folder = tmp_path / name
    shutil.copytree(FOLDER / name, folder)
    results = json.loads((folder / "results.json").read_text())
    main(["evaluate", "knn", str(folder), "--dataset_name", data, *flags])
    stored = json.loads((folder / "results.json").read_text())["evaluations"]
    expected, count = results["knn_accuracy"]["trained"], results["knn_test_samples"]
    # the card of the large one has another, of all images
    (found,) = (
        one["metrics"]["accuracy_k20"] for one in stored if one["task"] == "knn" and one["data"]["num_test"] == count
    )
    assert found == pytest.approx(expected, abs=math.sqrt(expected * (1 - expected) / count))


@pytest.mark.slow
def test_an_encoder_of_images_without_labels_has_the_masks_of_its_card(tmp_path):
    if not NUCLEI.is_dir():
        pytest.skip("needs the images of nuclei in ../shared/data/nuclei")
    folder = tmp_path / "nuclei"
    shutil.copytree(FOLDER / "nuclei", folder)
    (card,) = json.loads((folder / "results.json").read_text())["evaluations"]
    given = card["settings"] | {f"max_{one}_samples": card["data"][f"num_{one}"] for one in ("train", "test")}
    flags = [word for key, value in given.items() for word in (f"--{key}", str(value).lower())]
    columns = ["--image_column_name", "image", "--mask_column_name", "instances"]
    main(["evaluate", "dense", str(folder), "--dataset_name", str(NUCLEI), *columns, *flags])
    found = json.loads((folder / "results.json").read_text())["evaluations"][-1]["metrics"]
    assert found == pytest.approx(card["metrics"], abs=0.01)


def test_an_unknown_name_is_told_what_there_is():
    with pytest.raises(ValueError, match=r"expected one of .*digits.*, got 'digit'; did you mean 'digits'\?"):
        hf_vicreg.load("digit")
    with pytest.raises(ValueError, match=r"got '\.\./recipes'; for a folder or the Hub use AutoModel"):
        hf_vicreg.load("../recipes")


def test_which_of_two_of_one_name_was_taken_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "hf_vicreg")
    assert located("digits") == str(FOLDER / "digits")
    assert not caplog.records, "there is one alone"
    (tmp_path / "digits").mkdir()
    assert [located("digits") for _ in range(3)] == ["digits"] * 3
    (said,) = (one.message for one in caplog.records)
    assert said.startswith("digits: taken from the folder of this name here, not from the package; ")


@pytest.mark.parametrize("name", names())
def test_the_code_of_a_card_runs(name):
    card = (FOLDER / name / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    given = {"images": [Image.new("RGB", (50, 40), "grey")]}
    exec(code, given)
    assert given["features"].shape == (1, int(code.rpartition(", ")[2].rstrip(")\n")))
