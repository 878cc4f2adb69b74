"""What leaves the machine: an allow-list, no secrets, and a dry run that sends nothing."""

import hashlib
import json
import pickle
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_vicreg.cli import main
from hf_vicreg.publishing.custom_code import with_siblings
from hf_vicreg.publishing.staging import stage

TOKEN = "hf_" + "aB3" * 11
PLANTED = "correct-horse-battery"


@pytest.fixture
def run(run_folder, tmp_path):
    """A copy of a run, to be spoilt."""
    return shutil.copytree(run_folder, tmp_path / "run")


@pytest.fixture
def staged(tmp_path):
    """Returns a function that stages a folder."""

    def do(folder, **options):
        (tmp_path / "staged").mkdir()
        return stage(folder, tmp_path / "staged", repo="lab/demo", **options)

    return do


def tree(folder):
    """Hash of every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_only_what_is_on_the_list_is_staged(run, staged, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (run / "notes.txt").write_text(f"token {TOKEN}")
    (run / ".env").write_text(f"HF_TOKEN={TOKEN}")
    (run / "optimizer.pt").write_bytes(pickle.dumps({"state": TOKEN}))
    (run / "pytorch_model.bin").write_bytes(pickle.dumps(1))
    (run / "modeling_bigbird_vit.py").write_text(f"# not ours any more: {TOKEN}")
    (run / "README.md").write_text(f"my words and {TOKEN}")
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 99, "note": f"/home/someone/data {TOKEN}"}) + "\n")
    before = tree(run)
    found = staged(run)
    assert tree(run) == before
    assert set(found.names) == {
        "README.md",
        "attention_pattern.png",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "recipe.yaml",
        "results.json",
        "training_curves.png",
        *(f"{name}.py" for name in with_siblings({"modeling_bigbird_masked_image", "image_processing_bigbird_vit"})),
        "image_processing_pil_bigbird_vit.py",
    }
    assert {
        "notes.txt",
        ".env",
        "optimizer.pt",
        "pytorch_model.bin",
        "curves.png",
        "log.jsonl",
        "checkpoints/",
        "pretraining/",
    } == set(found.left_out)
    for name in found.names:
        content = (found.folder / name).read_bytes()
        assert TOKEN.encode() not in content, name
        assert str(run.parent).encode() not in content, name
    recipe = yaml.safe_load((found.folder / "recipe.yaml").read_text())
    assert not {"output_dir", "train_dir", "dataset_name"} & set(recipe)
    for picture in ("attention_pattern.png", "training_curves.png"):
        with Image.open(found.folder / picture) as image:
            assert not {"Software", "Author", "Comment"} & set(image.info)


@pytest.mark.parametrize(
    ("name", "plant", "what"),
    [
        ("results.json", f"hub {TOKEN}", "a Hub token"),
        ("results.json", f"pass {PLANTED}", "the value of a secret environment variable"),
        ("results.json", "read from /home/someone/photos", "a home folder"),
        ("config.json", "AKIA" + "ABCD1234" * 2, "an AWS key"),
        ("preprocessor_config.json", "ghp_" + "x1" * 18, "a GitHub token"),
        ("recipe.yaml", "-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("model.safetensors", f"made with {TOKEN}", "a Hub token"),
    ],
    ids=["token", "environment", "home", "aws", "github", "key", "weights"],
)
def test_a_secret_in_what_would_leave_is_refused_and_never_shown(name, plant, what, run, staged, monkeypatch):
    monkeypatch.setenv("DATABASE_PASSWORD", PLANTED)
    path = run / name
    if name == "model.safetensors":
        save_file(load_file(path), path, metadata={"format": "pt", "note": plant})
    elif name == "recipe.yaml":
        path.write_text(path.read_text().replace("mixed_precision: auto", f"mixed_precision: '{plant}'"))
    else:
        field = "hardware" if name == "results.json" else "note"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: plant}))
    with pytest.raises(ValueError, match="expected nothing secret") as caught:
        staged(run)
    message = str(caught.value)
    assert message.startswith((f"`{name}`: ", "`README.md`: "))
    assert what in message
    assert plant not in message
    assert "\n" not in message


def test_paths_in_results_become_names(run, staged):
    results = json.loads((run / "results.json").read_text())
    linear = {"task": "linear", "details": {"more": ["~/x/y", 3]}}
    (run / "results.json").write_text(json.dumps(results | {"dataset": "/srv/data/photos", "evaluations": [linear]}))
    found = staged(run)
    public = json.loads((found.folder / "results.json").read_text())
    assert (public["dataset"], public["evaluations"][0]["details"]["more"]) == ("photos", ["y", 3])
    assert "images of `photos`" in found.card


SOME_DIGITS = ["--dataset_name", "digits", "--max_train_samples", "64", "--max_test_samples", "32"]


def own_rows(card):
    """Lines of the card's table of evaluations."""
    return [line for line in card.splitlines() if line.startswith(("| knn |", "| finetune_classification |"))]


def test_figures_of_another_model_are_not_the_runs(run, staged, tmp_path, capsys):
    for model in (str(run), "digits"):
        assert main(["evaluate", "knn", model, *SOME_DIGITS, "--output_dir", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    own, other = results["evaluations"]
    own["date"], other["date"] = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"  # both took a second
    (run / "results.json").write_text(json.dumps(results))
    found = staged(run)
    (row,) = own_rows(found.card)
    assert f"accuracy_k1 {own['metrics']['accuracy_k1']:.3f}" in row
    values = [one.metric_value for one in ModelCard(found.card).data.eval_results]
    assert round(own["metrics"]["accuracy_k1"], 6) in values
    assert round(other["metrics"]["accuracy_k1"], 6) not in values
    public = json.loads((found.folder / "results.json").read_text())
    assert [one["model"]["name"] for one in public["evaluations"]] == ["run"]
    assert [one for one in found.left_out if one.startswith("of results.json knn of digits: ")]
    assert "neighbours.png" not in found.names  # the later one has drawn it
    own["date"] = "2026-01-03T00:00:00+00:00"
    (run / "results.json").write_text(json.dumps(results))
    (tmp_path / "later").mkdir()
    assert "neighbours.png" in stage(run, tmp_path / "later", repo="lab/demo").names


def test_figures_of_what_the_run_was_before_are_not_its_own(run, staged, capsys):
    assert main(["evaluate", "knn", str(run), *SOME_DIGITS]) == 0
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"image_size": 16}))
    found = staged(run)
    assert own_rows(found.card) == []
    assert "accuracy_k1" not in found.card
    assert "neighbours.png" not in found.names


def test_a_fine_tuned_classifiers_figures_are_its_own(run, staged, tmp_path, capsys):
    folder = tmp_path / "classifier"
    tuning = ["--num_train_epochs", "1", "--output_dir", str(folder)]
    assert main(["finetune", "classification", str(run), *SOME_DIGITS, *tuning]) == 0
    assert main(["evaluate", "knn", str(folder), *SOME_DIGITS]) == 0
    found = staged(folder)
    assert [row.split()[1] for row in own_rows(found.card)] == ["finetune_classification", "knn"]
    assert not [one for one in found.left_out if "results.json" in one]


@pytest.mark.parametrize(("source", "named"), [("lab/vit", "lab/vit"), ("/srv/models/vit", "vit")])
def test_a_converted_folder_names_its_source(source, named, run, staged):
    for name in ("recipe.yaml", "results.json", "log.jsonl"):
        (run / name).unlink()
    (run / "conversion.json").write_text(json.dumps({"source": source, "images": "4 images of noise"}))
    found = staged(run)
    assert f"with the weights of `{named}`, converted" in found.card
    assert "conversion.json" in found.left_out


def test_every_backend_and_class_is_named_in_the_configurations(run, staged):
    found = staged(run, include_pretraining=True)
    config, processor, wrapper = (
        json.loads((found.folder / name).read_text())
        for name in ("config.json", "preprocessor_config.json", "pretraining/config.json")
    )
    heads = {"AutoModelForImageClassification", "AutoModelForMaskedImageModeling"}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoBackbone", *heads}
    assert set(processor["auto_map"]["AutoImageProcessor"]) == {"torchvision", "pil"}
    assert set(wrapper["auto_map"]) == {"AutoConfig", "AutoModelForPreTraining"}
    for auto_map in (config["auto_map"], processor["auto_map"]["AutoImageProcessor"], wrapper["auto_map"]):
        for reference in auto_map.values():
            module, name = reference.split(".")
            assert f"class {name}(" in (found.folder / f"{module}.py").read_text()
    assert not any(name.endswith(".py") and "/" in name for name in found.names)  # code at the root alone


def test_an_encoder_of_transformers_own_needs_code_for_its_processor_only(run, staged):
    (run / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    found = staged(run)
    assert "auto_map" not in json.loads((found.folder / "config.json").read_text())
    assert {name for name in found.names if name.endswith(".py")} == {
        "channel_files.py",
        "channel_layout.py",
        "channel_pixels.py",
        "dicom_frames.py",
        "image_processing_bigbird_vit.py",
        "image_processing_pil_bigbird_vit.py",
        "rgb_image.py",
    }


def test_sharded_weights_come_along(run, staged):
    weights = load_file(run / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for shard, some in shards.items():
        save_file({name: weights[name] for name in some}, run / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, some in shards.items() for name in some}}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))
    (run / "model.safetensors").unlink()
    assert {*shards, "model.safetensors.index.json"} <= set(staged(run).names)


def test_a_model_that_does_not_load_is_not_published(run, capsys):
    weights = load_file(run / "model.safetensors")
    weights["embeddings.cls_token"] = torch.zeros(3)
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    assert main(["publish", str(run), "--repo", "lab/demo", "--dry_run"]) == 2
    assert "error: `RUN`: expected a model that loads with the package, got: " in capsys.readouterr().err


@pytest.mark.slow  # test_foreign_folders.py has a dry run with the same checks
def test_a_dry_run_prints_files_and_card_and_touches_nothing(run, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")  # it needs no account, and offline as the tests are, no network
    before = tree(run)
    assert main(["publish", str(run), "--repo", "lab/demo", "--dry_run"]) == 0
    assert tree(run) == before
    printed = capsys.readouterr().out
    size = (run / "model.safetensors").stat().st_size
    assert f"{size:>12,}  model.safetensors\n" in printed
    assert "left out: checkpoints/, curves.png, log.jsonl, pretraining/\n" in printed
    assert "# demo\n" in printed
    assert 'name = "lab/demo"' in printed
    assert printed.rstrip().endswith("dry run: loads and is complete; nothing was sent")
