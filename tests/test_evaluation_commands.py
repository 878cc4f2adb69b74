"""`hf-vicreg evaluate` and `finetune`: the examples of --help as written, what they leave, and what they refuse."""

import contextlib
import json
import re
import shlex

import datasets
import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, EfficientNetImageProcessor, MobileViTImageProcessor

import hf_vicreg
from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.model_cards.card import CardFacts, model_card
from hf_vicreg.training.evaluation.encoder import load_vision_encoder, weights_digest
from hf_vicreg.training.evaluation.results import read_results

COMMANDS = [
    ("evaluate", "knn"),
    ("evaluate", "linear"),
    ("evaluate", "retrieval"),
    ("evaluate", "few-labels"),
    ("finetune", "classification"),
]
NUMBERED = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
OWN = {"steps": 12, "knn_accuracy": {"trained": 0.5}}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a run, and images of two colours in folders by split and class."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    config = BigBirdViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        tile_size=1,
    )
    run = folder / "runs" / "mine"
    BigBirdViTModel(config).save_pretrained(run)
    BigBirdViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(run)
    (run / "results.json").write_text(json.dumps(OWN))
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    ).save_pretrained(folder / "runs" / "text")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, colour in (("ripe", (180, 30, 30)), ("unripe", (40, 150, 40))):
            where = folder / "my_labelled_images" / split / name
            where.mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(-30, 30, (36, 36, 3), generator=generator)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(where / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def _at_work(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(workplace / "hf_home"))


def contents(folder):
    return [one for one in sorted(folder.rglob("*")) if "hf_home" not in one.parts]


def example(verb, what, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, what, "--help"])
    assert caught.value.code == 0
    (line,) = re.findall(r"^example:\n\s+(hf-vicreg .*)$", capsys.readouterr().out, re.MULTILINE)
    return shlex.split(line)[1:]


@pytest.mark.parametrize(("verb", "what"), COMMANDS)
def test_the_example_of_help_runs_as_written(verb, what, workplace, capsys):
    arguments = example(verb, what, capsys)
    assert arguments[:2] == [verb, what]
    code = main(arguments)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    folder = workplace / ("runs/classifier" if verb == "finetune" else "runs/mine")
    results = json.loads((folder / "results.json").read_text())
    task = {"classification": "finetune_classification"}.get(what, what.replace("-", "_"))
    (record,) = (one for one in results["evaluations"] if one["task"] == task)
    assert record["metrics"]
    assert record["data"]["class_names"] == ["ripe", "unripe"]
    assert (record["data"]["num_train"], record["data"]["num_test"]) == (24, 12)
    assert record["data"]["test_images_in_train"] == 0
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in record["pictures"])
    assert str(workplace) not in json.dumps(record)
    if verb == "evaluate":
        assert {key: results[key] for key in OWN} == OWN
        assert "24 training images, 2 classes" in printed.out
        for name in ["results.json", *record["pictures"]]:
            assert name in printed.out
    if what == "knn":
        assert list(record["metrics"]) == ["accuracy_k1", "accuracy_k5", "accuracy_k10", "accuracy_k20"]
        assert record["metrics"]["accuracy_k5"] == 1
        assert record["details"]["confusion"] == [[6, 0], [0, 6]]
        assert set(record["pictures"]) == {"knn_confusion.png", "neighbours.png"}
    if what == "few-labels":
        assert {(run["labels"], run["num_labels"]) for run in record["details"]["runs"]} == {("10%", 2), ("2", 4)}
        assert {run["method"] for run in record["details"]["runs"]} == {"linear", "finetuned"}
        assert record["metrics"]["linear_2_mean"] > 0.8


def test_all_methods_of_few_labels_and_a_folder_of_its_own(workplace, capsys):
    flags = "--labels +3 --methods scratch consistency --max_steps 2 --num_seeds 1 --output_dir few --seed 5"
    assert main(["evaluate", "few-labels", "runs/mine", "--dataset_name", "my_labelled_images", *flags.split()]) == 0
    (record,) = json.loads((workplace / "few" / "results.json").read_text())["evaluations"]
    assert [(run["method"], run["seed"]) for run in record["details"]["runs"]] == [("scratch", 5), ("consistency", 5)]
    assert list(read_results(workplace / "few")["evaluations"][0]["metrics"])[:1] == ["scratch_3_mean"]
    assert record["settings"]["max_steps"] == 2


def test_labels_of_a_file_are_told_from_others_and_from_those_of_the_data_set(workplace, capsys):
    images = workplace / "my_labelled_images" / "train" / "ripe"
    rows = [f"{index}.png,{'odd' if index % 2 else 'even'},{'test' if index > 8 else 'train'}" for index in range(12)]
    swapped = [row.replace("odd", "even") if row.startswith("11") else row for row in rows]
    for name, content in (("one", rows), ("other", swapped), ("again", rows[::-1])):
        (workplace / f"{name}.csv").write_text("\n".join(["file_name,label,split", *content]))
        command = ["evaluate", "knn", "runs/mine", "--dataset_name", str(images), "--labels_file", f"{name}.csv"]
        assert main([*command, "--output_dir", "by_file"]) == 0, capsys.readouterr().err
        results = read_results(workplace / "by_file")
        data = results["evaluations"][-1]["data"]
        assert f"labels of a file (digest {data['labels_digest']})" in capsys.readouterr().out
        assert (data["label_column"], data["train_split"], data["test_split"]) == ("labels_file", "train", "train")
    assert len(results["evaluations"]) == 2  # `again` says what `one` says, and takes its place
    card = model_card(CardFacts(name="mine", config={"model_type": "bigbird_vit"}, results=results))
    assert f"| 3 images of `ripe`, 9 training images, labels of a file (digest {data['labels_digest']}) |" in card
    assert "--train_split train" in card
    assert "--labels_file LABELS.csv" in card
    assert "--test_split" not in card
    assert "model-index" not in card


@pytest.mark.parametrize("known", [1, 0])
def test_images_of_unknown_classes_count_in_the_share_of_right_firsts(known, workplace, capsys):
    paths = [str(workplace / "my_labelled_images" / "train" / name / "0.png") for name in ("ripe", "unripe")]
    others = [str(workplace / "my_labelled_images" / "test" / "ripe" / f"{index}.png") for index in range(4 - known)]
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ripe", "unripe", "rotten"]))
    rows = {"train": (paths, [0, 1]), "test": (paths[:known] + others, [0] * known + [2] * len(others))}
    splits = {
        split: datasets.Dataset.from_dict({"image": files, "label": labels}, features=kinds)
        for split, (files, labels) in rows.items()
    }
    datasets.DatasetDict(splits).save_to_disk(f"known_{known}", num_shards=dict.fromkeys(splits, 1))
    command = [
        "evaluate",
        "retrieval",
        "runs/mine",
        "--dataset_name",
        f"known_{known}",
        "--output_dir",
        f"out_{known}",
    ]
    code = main(command)
    printed = capsys.readouterr()
    if known:
        assert re.search(r"first is right +0\.250 ± 0\.217\n", printed.out), printed  # of 4, of which 1 is counted
    else:
        assert code == 2
        assert "`test_split`: expected test images of classes that training images have" in printed.err
        assert not (workplace / "out_0" / "results.json").exists()


KNN = ["evaluate", "knn"]


def test_many_classes_by_number_have_no_matrix(workplace):
    pixels = torch.randint(0, 256, (101, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = [Image.fromarray(one.numpy()) for one in pixels]
    labels = [1_000 * index for index in range(101)]
    splits = {
        split: datasets.Dataset.from_dict({"image": images[:count], "label": labels[:count]}, features=NUMBERED)
        for split, count in (("train", 101), ("test", 3))
    }
    datasets.DatasetDict(splits).save_to_disk("my_numbers")
    flags = ["runs/mine", "--dataset_name", "my_numbers", "--output_dir"]
    assert main([*KNN, *flags, "numbers", "--neighbours", "1"]) == 0
    assert main(["finetune", "classification", *flags, "numbered", "--max_steps", "1", "--batch_size", "2"]) == 0
    for folder in (workplace / "numbers", workplace / "numbered"):
        (record,) = json.loads((folder / "results.json").read_text())["evaluations"]
        assert record["data"]["num_classes"] == 101
        assert "confusion" not in record["details"]
        assert not list(folder.glob("*confusion.png"))
    assert json.loads((workplace / "numbered" / "config.json").read_text())["id2label"]["100"] == "100000"


@pytest.mark.parametrize("kind", [MobileViTImageProcessor, EfficientNetImageProcessor])
def test_other_pixels_in_testing_than_in_training_are_refused(kind, workplace, capsys):
    BigBirdViTModel.from_pretrained("runs/mine").save_pretrained("runs/others")
    size = {"height": 32, "width": 32}
    kind(size=size, crop_size=size).save_pretrained("runs/others")
    flags = ["runs/others", "--dataset_name", "my_labelled_images", "--output_dir", "others", "--max_steps", "1"]
    assert main(["finetune", "classification", *flags]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: `MODEL`: expected an image processor that divides RGB by 255 and normalises it")
    assert not (workplace / "others").exists()


def test_test_images_among_the_unlabelled_ones_are_counted(workplace):
    flags = "--consistency --unlabelled_dir my_labelled_images/test --output_dir leaky --max_steps 1"
    arguments = ["runs/mine", "--dataset_name", "my_labelled_images", *flags.split()]
    assert main(["finetune", "classification", *arguments]) == 0
    (record,) = json.loads((workplace / "leaky" / "results.json").read_text())["evaluations"]
    assert record["data"]["test_images_in_train"] == 12


def test_a_classifier_is_saved_though_its_picture_cannot_be(workplace):
    flags = ["runs/mine", "--dataset_name", "my_labelled_images", "--output_dir", "undrawn", "--max_steps", "1"]
    assert main(["finetune", "classification", *flags]) == 0
    folder = workplace / "undrawn"
    for name in ("model.safetensors", "classifier_confusion.png"):
        (folder / name).unlink()
    (folder / "classifier_confusion.png").mkdir()
    with contextlib.suppress(OSError):
        main(["finetune", "classification", *flags, "--resume_from_checkpoint", "latest"])
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*KNN, "nowhere", "--dataset_name", "my_labelled_images"], "`MODEL`: expected the folder or Hub id"),
        (
            [*KNN, "runs/text", "--dataset_name", "my_labelled_images"],
            "expected a vision encoder, got a model of type",
        ),
        ([*KNN, "runs/mine"], "`dataset_name`: expected labelled images, got none"),
        ([*KNN, "runs/mine", "--dataset_name", "no/such/folder"], "`dataset_name`: expected a Hub id or an existing"),
        (
            [*KNN, "runs/mine", "--dataset_name", "my_labelled_images", "--neighbours", "500"],
            "`neighbours`: expected a k of at most the 24 training images, got [500]",
        ),
        (
            [*KNN, "runs/mine", "--dataset_name", "my_labelled_images", "--label_column_name", "kind"],
            "`label_column_name`: expected a column 'kind' with labels",
        ),
        (
            ["evaluate", "few-labels", "runs/mine", "--dataset_name", "my_labelled_images", "--labels", "13"],
            "`labels`: expected at most 12 images, which is all of class 'ripe', got 13 a class",
        ),
        (
            ["evaluate", "few-labels", "runs/mine", "--dataset_name", "my_labelled_images", "--methods", "magic"],
            "`methods`: expected some of linear, finetuned, scratch, consistency, got 'magic'",
        ),
        (
            ["finetune", "classification", "runs/text", "--dataset_name", "my_labelled_images", "--output_dir", "o"],
            "`MODEL`: expected the folder or Hub id of a vision model",
        ),
    ],
    ids=["no-model", "text", "no-data", "no-folder", "neighbours", "column", "labels", "methods", "text-classifier"],
)
def test_bad_input_gets_one_line_and_leaves_nothing(arguments, message, workplace, capsys):
    before = contents(workplace)
    assert main(arguments) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert message in line
    assert contents(workplace) == before


def test_an_encoder_of_the_package_is_called_by_its_name_unless_a_folder_is(workplace, capsys, monkeypatch):
    assert main([*KNN, "digits", "--dataset_name", "my_labelled_images", "--neighbours", "3"]) == 0
    (stored,) = json.loads((workplace / "digits-evaluation" / "results.json").read_text())["evaluations"]
    assert stored["model"]["name"] == "digits"
    assert stored["model"]["weights"] == weights_digest(hf_vicreg.load("digits"))
    assert main(["inspect", "cost", "digits"]) == 0
    flags = [
        "--dataset_name",
        "my_labelled_images",
        "--max_steps",
        "1",
        "--output_dir",
        "new_digits",
        "--from_scratch",
    ]
    assert main(["finetune", "classification", "digits", *flags]) == 0
    monkeypatch.chdir(workplace / "my_labelled_images")
    (workplace / "my_labelled_images" / "digits").symlink_to(workplace / "runs" / "mine")
    assert load_vision_encoder("digits").model.config.hidden_size == 32
