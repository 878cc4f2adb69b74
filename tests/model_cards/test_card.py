"""The model card: nothing that was not measured, metadata that the Hub reads, and room for people's own words."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_vicreg.model_cards.card import CardFacts, loading_snippet, model_card, with_folders_named
from hf_vicreg.model_cards.merging import OBJECTIVES, SECTIONS, merged_card
from hf_vicreg.model_cards.results import evaluation_results

CARDS = Path(__file__).resolve().parents[2] / "model_cards"
PICTURES = ("training_curves.png", "attention_pattern.png", "neighbours.png")
CONFIG = {"model_type": "bigbird_vit", "hidden_size": 128, "architectures": ["BigBirdViTModel"]}
RESULTS = {
    "dataset": "digits",
    "hub_dataset": None,
    "num_images": 1437,
    "steps": 396,
    "skipped_steps": 3,
    "training_seconds": 158.3,
    "hardware": "2 CPU cores (x86_64)",
    "encoder_parameters": 812416,
    "features": 128,
    "attention_density": 0.5708,
    "knn_neighbours": 20,
    "knn_train_samples": 1437,
    "knn_test_samples": 360,
    "knn_accuracy": {"raw_pixels": 0.7139, "untrained": 0.3472, "trained": 0.925},
}
LOG = [
    {
        "step": 10 * index,
        "loss": 9.5 - index / 7,
        "invariance": 0.0912,
        "variance": 0.7541,
        "covariance": 0.5233,
        "images_per_second": 301.0 + index,
    }
    for index in range(1, 8)
]
RECIPE = {"batch_size": 128, "dataset_name": "digits", "output_dir": "/home/me/runs/x", "train_dir": None}
FACTS = {
    "name": "demo",
    "config": CONFIG,
    "results": RESULTS,
    "recipe": RECIPE,
    "log": LOG,
    "repo_id": "lab/demo",
    "license": "apache-2.0",
}


EVALUATION = {
    "task": "finetune_classification",
    "data": {"dataset": "digits", "config": None, "test_split": "test", "num_test": 360, "num_train": 100},
    "settings": {"learning_rate": 1e-3, "labels_per_class": None},
    "metrics": {"accuracy": 0.9111},
    "details": {"pretrained_model": "run", "num_labelled": 100, "num_unlabelled": 0, "training_seconds": 9.5},
}


def card_of(**changes):
    return model_card(CardFacts(**FACTS | changes))


def section(card, name):
    """The text between a section's two comment lines."""
    return re.search(rf"<!-- hf_vicreg:{name} .*?-->\n(.*?)<!-- /hf_vicreg:{name} -->", card, re.DOTALL)[1]


def figures(text):
    """Every number of a text, outside of words and code blocks."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"(?<![\w.\"-])\d[\d,]*(?:\.\d+)?(?![\w\"])", text)


def known_figures(results, log, recipe):
    """What results, log and recipe hold, as a card may write it."""
    values = [recipe["batch_size"], *[value for record in log for value in record.values()]]
    values += [value for one in (results, results["knn_accuracy"]) for value in one.values()]
    numbers = [value for value in values if isinstance(value, int | float)]
    forms = (",d", ".0f", ".1f", ".3f", ".4f")
    written = {format(int(one) if form == ",d" else one, form) for one in numbers for form in forms}
    return written | set(re.findall(r"\d+", results["hardware"]))


def test_every_figure_is_one_that_was_measured():
    card = card_of()
    known = known_figures(RESULTS, LOG, RECIPE)
    found = [one for name in ("about", "results", "training", "attention") for one in figures(section(card, name))]
    assert len(found) > 15
    assert [one for one in found if one not in known] == []
    assert {"0.925", "0.714", "0.347", "158.3", "305", "8.500", "812,416", "0.571"} <= set(found)
    assert "not measured" not in section(card, "results") + section(card, "training") + section(card, "attention")


@pytest.mark.parametrize(
    ("missing", "where"),
    [
        (("knn_accuracy", "untrained"), "| untrained encoder | not measured |"),
        (("knn_accuracy", "trained"), "| **this encoder** | not measured |"),
        (("training_seconds",), "| time | not measured |"),
        (("attention_density",), "allows, on the views of training: not measured."),
        (("encoder_parameters",), "Parameters: not measured."),
        (("num_images",), "not measured images of `digits`"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_a_missing_figure_reads_not_measured(missing, where):
    results = json.loads(json.dumps(RESULTS))
    inside = results
    for key in missing[:-1]:
        inside = inside[key]
    value = inside.pop(missing[-1])
    card = card_of(results=results)
    assert where in card
    assert where not in card_of()
    if missing[0] == "knn_accuracy":
        assert str(value) not in card


def test_a_card_without_log_or_results_measures_nothing():
    card = card_of(results={}, log=[], recipe={})
    assert "| throughput | not measured |" in card
    assert "| loss at the end | not measured |" in card
    assert "model-index" not in ModelCard(card).data.to_dict()
    assert [one for name in ("about", "results", "training") for one in figures(section(card, name))] == []


def test_images_without_labels_have_no_table_of_accuracies():
    results = RESULTS | {"knn_accuracy": {}}
    assert "k-NN accuracy on held-out images: not measured." in section(card_of(results=results), "results")
    metrics = {"pixels_knn_dice": 0.379, "untrained_knn_dice": 0.441, "knn_dice": 0.537, "linear_mean_iou": 0.614}
    data = {"dataset": "nuclei", "num_train": 100, "num_test": 30, "mask_column": "instances"}
    masks = {"task": "dense", "metrics": metrics, "data": data, "settings": {"neighbours": 20}}
    found = section(card_of(results=results | {"evaluations": [masks]}), "results")
    assert "accuracy" not in found
    assert "| untrained encoder | not measured | 0.441 | not measured | not measured |" in found
    assert "| **this encoder** | not measured | 0.537 | 0.614 | not measured |" in found
    assert "--neighbours 20 --mask_column_name instances --max_train_samples 100 --max_test_samples 30" in found


def test_figures_of_other_images_or_columns_have_other_commands():
    data = {"dataset": "birds", "image_column": "photo", "label_column": "label", "num_train": 12, "num_test": 4}
    one = {"task": "knn", "metrics": {"accuracy_k1": 0.5}, "data": data, "settings": {"seed": 0}}
    fewer = one | {"data": data | {"label_column": "species", "num_train": 5, "num_test": 2}}
    found = section(card_of(results=RESULTS | {"evaluations": [one, fewer]}), "results")
    for label, train, test in (("label", 12, 4), ("species", 5, 2)):
        assert f"| {test} images of `birds`, {train} training images |" in found
        columns = f"--image_column_name photo --label_column_name {label}"
        assert f"--seed 0 {columns} --max_train_samples {train} --max_test_samples {test}`" in found


@pytest.mark.parametrize("task", ["knn", "dense"])
def test_test_images_that_were_trained_on_are_said(task):
    data = {"dataset": "birds", "num_train": 5000, "num_test": 4000, "test_images_in_train": 1200}
    one = {"task": task, "metrics": {"knn_dice": 0.5}, "data": data, "settings": {}}
    said = ", 1,200 of the test images are among the training images"
    assert said in card_of(results=RESULTS | {"evaluations": [one]})
    for apart in (data | {"test_images_in_train": 0}, {key: data[key] for key in ("dataset", "num_test")}):
        assert "among the training" not in card_of(results=RESULTS | {"evaluations": [one | {"data": apart}]})


def test_metadata_round_trips_through_huggingface_hub(tmp_path):
    results = RESULTS | {"hub_dataset": "lab/numbers", "dataset": "lab/numbers"}
    (tmp_path / "README.md").write_text(card_of(results=results))
    read = metadata_load(tmp_path / "README.md")
    assert read == ModelCardData(**read).to_dict() == ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert read["library_name"] == "transformers"
    assert read["pipeline_tag"] == "image-feature-extraction"
    assert read["license"] == "apache-2.0"
    assert read["datasets"] == ["lab/numbers"]
    assert read["metrics"] == ["accuracy"]
    (index,) = read["model-index"]
    (result,) = index["results"]
    assert index["name"] == "demo"
    assert result["dataset"] == {"type": "lab/numbers", "name": "lab/numbers"}
    assert result["metrics"] == [{"type": "accuracy", "value": 0.925, "name": "20-NN accuracy, measured by the run"}]
    assert "datasets" not in ModelCard(card_of()).data.to_dict()  # `digits` is no data set of the Hub's


def test_nothing_of_the_machine_is_in_the_card():
    results = RESULTS | {"dataset": "/home/me/secret/photos"}
    card = card_of(results=results, recipe=RECIPE | {"train_dir": "/home/me/secret/photos"})
    assert "/home" not in card
    assert "secret" not in card
    assert "images of `photos`" in card
    assert "--train_dir FOLDER_OF_IMAGES --output_dir runs/demo" in card


def test_a_second_encoder_is_mentioned_where_there_is_one():
    knn = RESULTS["knn_accuracy"] | {"second_untrained": 0.2111, "second_trained": 0.8333}
    second = {
        "results": RESULTS | {"knn_accuracy": knn},
        "recipe": RECIPE | {"second_model": {"model_type": "resnet"}},
    }
    card = card_of(has_second_encoder=True, **second)
    assert "`second_encoder` holds the encoder of the other branch, a `resnet`" in card
    assert "| second encoder, untrained | 0.211 |\n| **second encoder** | 0.833 |" in card
    assert 'subfolder="second_encoder"' in card
    assert "second" not in card_of()


def test_a_classifier_has_a_card_of_its_own():
    config = CONFIG | {"architectures": ["BigBirdViTForImageClassification"], "id2label": {"0": "cat", "1": "dog"}}
    card = card_of(config=config, results={}, recipe={}, log=[])
    assert "Accuracy on held-out images: not measured." in card
    assert "| pretrained encoder | not measured |" in card
    tuned = card_of(config=config, results={"evaluations": [EVALUATION]}, recipe={}, log=[])
    assert (
        "| finetune_classification | 360 images of `digits`, 100 training images | accuracy 0.911 | "
        "`hf-vicreg finetune classification" in tuned
    )
    flags = "--test_split test --learning_rate 0.001 --max_train_samples 100 --max_test_samples 360`"
    assert f"--dataset_name digits {flags}" in tuned
    assert "| labelled images | 100 |" in tuned
    (result,) = ModelCard(tuned).data.to_dict()["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.9111, "name": "accuracy"}]
    assert ModelCard(card).data.pipeline_tag == "image-classification"
    assert "A `bigbird_vit` classifier of 2 classes" in card
    assert 'pipeline("image-classification", model=name, trust_remote_code=True)' in card


def test_the_snippet_of_a_folder_needs_the_package_and_no_trust():
    local, remote = (loading_snippet(CardFacts(**FACTS | {"repo_id": repo})) for repo in (None, "lab/demo"))
    assert "import hf_vicreg" in local
    assert "trust_remote_code" not in local
    assert "hf_vicreg" not in remote
    assert remote.count("trust_remote_code=True") == 2


def test_what_people_wrote_around_the_sections_stays():
    old = card_of(results=RESULTS | {"training_seconds": 1.0})
    edited = old.replace("# demo\n", "# Our model\n\nWhy we made it.\n").replace("license: apache-2.0", "license: mit")
    edited = edited.replace("tags:\n", "base_model: lab/older\ntags:\n- medical\n")
    edited = edited.replace(section(edited, "limits"), "- none at all\n")  # inside of a section it is overwritten
    assert ModelCard(merged_card(edited, card_of())).data.license == "apache-2.0"  # one that is given counts
    merged = merged_card(edited, card_of(license=None))
    assert "Why we made it." in merged
    assert "# demo" not in merged
    assert "| time | 158.3 s |" in merged
    assert "| time | 1.0 s |" not in merged
    assert "none at all" not in merged
    data = ModelCard(merged).data.to_dict()
    assert (data["license"], data["base_model"], data["tags"][0]) == ("mit", "lab/older", "medical")
    assert "vicreg" in data["tags"]
    assert merged_card(merged, card_of(license=None)) == merged


def test_what_was_generated_before_goes_and_what_people_stated_stays():
    def card(objective, source, dataset):
        results = RESULTS | {"objective": objective, "method": objective, "hub_dataset": dataset, "dataset": dataset}
        return card_of(results=results, recipe=RECIPE | {"model_name_or_path": source})

    old = ModelCard(card("vicreg", "facebook/dinov2-small", "lab/first"))
    theirs = {"task": {"type": "image-classification"}, "dataset": {"name": "X", "type": "lab/x"}}
    theirs["metrics"] = [{"type": "f1", "value": 0.77}]
    front = old.data.to_dict()
    front["datasets"] = ["lab/mine", *front["datasets"]]
    front["metrics"] = ["f1", *front["metrics"]]
    front["tags"] = ["medical", *front["tags"]]
    front["model-index"][0]["results"].append(theirs)
    edited = f"---\n{yaml.safe_dump(front)}---\n\n{old.text}"
    data = ModelCard(merged_card(edited, card("simclr", "google/vit", "lab/second"))).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("google/vit", "finetune")
    assert data["tags"] == ["medical", "simclr", "bigbird_vit", "self-supervised-learning", "sparse-attention"]
    assert data["datasets"] == ["lab/mine", "lab/second"]
    assert data["metrics"] == ["f1", "accuracy"]
    (index,) = data["model-index"]
    assert [one["metrics"][0]["type"] for one in index["results"]] == ["f1", "accuracy"]
    assert index["results"][1]["dataset"]["name"] == "lab/second"
    anew = ModelCard(merged_card(edited, card("vicreg", None, None))).data.to_dict()
    assert not {"base_model", "base_model_relation"} & set(anew)
    assert anew["datasets"] == ["lab/mine"]


def test_a_card_made_by_hand_keeps_its_tags_results_and_base():
    front = {"tags": "simclr", "base_model": "lab/older", "datasets": "lab/mine"}
    theirs = {"task": {"type": "image-classification"}, "dataset": {"name": "X", "type": "lab/x"}}
    front["model-index"] = [{"name": "mine", "results": [theirs | {"metrics": [{"type": "f1", "value": 0.77}]}]}]
    data = ModelCard(merged_card(f"---\n{yaml.safe_dump(front)}---\n\n# Mine\n", card_of(results={}))).data.to_dict()
    assert data["tags"][:2] == ["simclr", "vicreg"]
    assert (data["base_model"], data["datasets"]) == ("lab/older", ["lab/mine"])
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.77


def test_every_objective_is_a_tag_that_publishing_again_takes_away():
    from hf_vicreg.training.objectives.registry import ENTRIES

    assert set(OBJECTIVES) == set(ENTRIES)


@pytest.mark.parametrize("source", ["facebook/dinov2-small", "vit", None])
def test_weights_of_others_are_not_called_pretrained_by_us(source):
    config = CONFIG | {"architectures": ["BigBirdViTForImageClassification"], "id2label": {"0": "a", "1": "b"}}
    for more in ({}, {"config": config}):
        card = card_of(results={}, recipe={}, log=[], converted_from=source, **more)
        about, data = section(card, "about"), ModelCard(card).data
        assert "VICReg" not in about
        assert "without labels" not in about
        assert not {"vicreg", "self-supervised-learning"} & set(data.tags)
        assert data.base_model == ("facebook/dinov2-small" if source and "/" in source else None)
        assert (f"with the weights of `{source}`, converted" in about) == (source is not None)


def test_tags_and_license_say_what_is_so():
    def read(**changes):
        return ModelCard(card_of(**changes)).data

    assert "sparse-attention" in read().tags
    resnet, dense = CONFIG | {"model_type": "resnet"}, CONFIG | {"attention_type": "original_full"}
    for config in (resnet, dense):
        assert "sparse-attention" not in read(config=config).tags
        merged = merged_card(card_of(), card_of(config=config))
        assert "sparse-attention" not in ModelCard(merged).data.tags
    assert read(license="other").license == "other"
    assert "license:" not in card_of(license=None).partition("\n---\n")[0]
    with pytest.raises(ValueError, match="`license`: expected the Hub's short name"):
        read(license="Apache 2.0\nmodel-index: []")


def test_a_section_taken_out_stays_out_and_a_card_without_any_gets_all():
    without = re.sub(r"<!-- hf_vicreg:attention .*?/hf_vicreg:attention -->\n", "", card_of(), flags=re.DOTALL)
    assert "hf_vicreg:attention" not in merged_card(without, card_of())
    merged = merged_card("# Mine\n\nMy words.\n", card_of())
    assert merged.index("# Mine") < merged.index("My words.") < merged.index("<!-- hf_vicreg:about")
    assert all(f"<!-- hf_vicreg:{name} " in merged for name in SECTIONS)
    assert merged_card(card_of(), card_of()).strip() == card_of().strip()


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in CARDS.glob("*/README.md")), ids=lambda path: path.name
)
def test_a_committed_card_is_what_its_evidence_gives(folder):
    card = (folder / "README.md").read_text()
    config, results = (json.loads((folder / name).read_text()) for name in ("config.json", "results.json"))
    facts = CardFacts(
        name=folder.name,
        config=config,
        results=results,
        recipe=yaml.safe_load((folder / "recipe.yaml").read_text()),
        log=[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()],
        comes_with_package=True,
        license=ModelCard(card).data.license,
        pictures=tuple(name for name in PICTURES if (folder / name).exists()),
        has_second_encoder="second_trained" in results.get("knn_accuracy", {}),
    )
    assert card == model_card(facts)


@pytest.mark.parametrize(
    ("source", "named"),
    [("facebook/dinov2-small", "facebook/dinov2-small"), ("/home/me/runs/first", None), ("first", None), (None, None)],
)
def test_metadata_name_the_model_of_the_hub_it_began_with(source, named):
    encoder = card_of(recipe=RECIPE | {"model_name_or_path": source})
    tuned = EVALUATION | {"details": EVALUATION["details"] | {"pretrained_model": source}}
    classifier = card_of(
        recipe={},
        config=CONFIG | {"architectures": ["BigBirdViTForImageClassification"], "id2label": {"0": "a", "1": "b"}},
        results={"encoder_parameters": 7, "evaluations": [tuned]},
    )
    several = EVALUATION | {"task": "finetune_multitask", "details": {"pretrained_model": source, "tasks": {}}}
    for card in (encoder, classifier, card_of(recipe={}, results={"evaluations": [several]})):
        data = ModelCard(card).data
        assert data.base_model == named
        assert data.to_dict().get("base_model_relation") == (named and "finetune")


@pytest.mark.parametrize("name", ["someone/encoder", "nuclei"])
def test_a_start_that_others_have_is_repeated_by_the_command(name):
    text = card_of(recipe={"batch_size": 8, "model_name_or_path": name})
    assert f"the weights of `{name}`" in text
    assert "FOLDER_OF_AN_ENCODER" not in text
    assert "folder on a disk" not in text


@pytest.mark.parametrize("key", ["model_name_or_path", "teacher", "text_model"])
def test_a_folder_is_told_from_an_id_of_the_hub_without_an_owner(key):
    model = card_of(recipe={"batch_size": 8, key: "bert-base-uncased"})
    assert "FOLDER_OF" not in model
    assert "folder on a disk" not in model
    folder = card_of(recipe=with_folders_named({"batch_size": 8, key: "/home/me/models/first"}))
    assert f" --{key} FOLDER_OF_" in folder
    assert "The author's `first` was a folder on a disk" in folder
    assert "/home/me" not in folder
    assert ModelCard(folder).data.base_model is None


def test_accuracies_of_several_methods_are_told_apart_in_the_metadata():
    """The Hub groups them by task and data set, and keeps the name of the first alone."""
    data = {"dataset": "set", "num_test": 10, "num_train": 20}
    found = [
        ("knn", {"accuracy_k20": 0.5}),
        ("linear", {"accuracy": 0.6}),
        ("finetune_classification", {"accuracy": 0.7}),
    ]
    evaluations = [{"task": task, "metrics": metrics, "data": data} for task, metrics in found]
    index = eval_results_to_model_index("m", evaluation_results({"evaluations": evaluations}, "set"))
    metrics = [one for result in index[0]["results"] for one in result["metrics"]]
    assert {one["name"]: one["value"] for one in metrics} == {
        "20-NN accuracy": 0.5,
        "linear probe accuracy": 0.6,
        "accuracy": 0.7,
    }
