"""A run on images with captions, from a folder with metadata: what it leaves, how it goes on, and who can use it."""

import contextlib
import io
import json
import re
import shutil

import datasets
import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel, DistilBertConfig, DistilBertModel, pipeline

from hf_vicreg import VicRegDualEncoder, embed, pretrain
from hf_vicreg.cli import main
from hf_vicreg.explore.explorer import open_explorer
from hf_vicreg.publishing.custom_code import with_siblings
from hf_vicreg.publishing.staging import stage
from hf_vicreg.report.report import write_report
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import ImageTextArguments
from hf_vicreg.training.image_text.evaluate import evaluate_image_text
from hf_vicreg.training.image_text.search import search
from hf_vicreg.training.monitor.doctor import read_run
from hf_vicreg.training.texts.tokenizer import build_tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220), "white": (240, 240, 240)}
TEXTS = {"model_type": "distilbert", "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "vocab_size": 300}
FLAGS = {
    "caption_column": ["text", "text_de"],
    "second_model": TEXTS,
    "max_text_length": 12,
    "batch_size": 16,
    "max_steps": 4,
    "num_train_epochs": 2,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 5,
    "knn_every_epochs": 1,
    "views": {"jitter_probability": 0.0, "grayscale_probability": 0.0},
}
CLIP = {
    "model_type": "clip_text_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Walls in four colours with captions in two languages; one has none."""
    folder = tmp_path_factory.mktemp("walls")
    for split, count in (("train", 33), ("test", 12)):
        (folder / split).mkdir()
        lines = []
        for number in range(count):
            name = list(COLOURS)[number % 4]
            noise = torch.randint(0, 14, (36, 36, 3), dtype=torch.uint8) + torch.tensor(COLOURS[name]).to(torch.uint8)
            Image.fromarray(noise.numpy()).save(folder / split / f"{number}.png")
            texts = {"text": f"a {name} wall, number {number}", "text_de": None if number % 3 else f"{name} Wand"}
            texts = {"text": "", "text_de": None} if number == 32 else texts
            lines.append(json.dumps({"file_name": f"{number}.png", "other_file_name": f"{number}.png"} | texts))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def flags(request):
    conftest = request.config.pluginmanager.get_plugin(str(request.config.rootpath / "tests" / "conftest.py"))
    flags = conftest.TINY_RECIPE | FLAGS | {"image_column_name": "image"}
    return flags | {"model": conftest.TINY_RECIPE["model"] | {"drop_path_rate": 0.0}}


@pytest.fixture(scope="module")
def run(data, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "walls"
    threads = torch.get_num_threads()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pretrain(out=folder, data=data, **flags)
    torch.set_num_threads(threads)
    (folder.parent / "printed.txt").write_text(printed.getvalue())
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def pictures():
    return [Image.new("RGB", (40, 40), colour) for colour in COLOURS.values()]


def test_the_folder_is_a_model_that_everybody_can_use(run):
    model, processor = AutoModel.from_pretrained(run).eval(), AutoProcessor.from_pretrained(run)
    assert type(model) is VicRegDualEncoder
    texts = [f"a {name} wall" for name in COLOURS]
    inputs = processor(images=pictures(), text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits_per_image.softmax(-1)
    find = pipeline("zero-shot-image-classification", model=str(run))
    for row, found in zip(scores, find(pictures(), candidate_labels=texts, hypothesis_template="{}"), strict=True):
        by_name = {one["label"]: one["score"] for one in found}
        torch.testing.assert_close(torch.tensor([by_name[text] for text in texts]), row, rtol=0, atol=1e-5)
    for place, kind in (("image_encoder", "bigbird_vit"), ("text_encoder", "distilbert")):
        assert AutoModel.from_pretrained(run, subfolder=place).config.model_type == kind


def test_the_end_of_a_run_says_recall_and_code_that_works(run):
    figures, code = (run.parent / "printed.txt").read_text().split("To load it:\n\n")
    recall = json.loads((run / "results.json").read_text())["image_text"]["text_to_image_recall_10"]
    assert re.search(rf"images found by a caption .* at 10: {recall:.3f}", figures)
    made = {"images": pictures()}
    exec(code, made)
    assert made["logits"].shape == (len(COLOURS), 2)


def test_its_report_looks_through_the_encoder_of_images(run, tmp_path):
    text = write_report(run, data="digits", output=tmp_path / "report.html").read_text()
    assert 'id="attention"' in text
    assert "Needs" not in text


def test_a_loss_of_pairs_is_called_by_its_name(data, flags, tmp_path):
    given = flags | {"vicreg": {"expander_sizes": [16, 8], "pair_loss": "infonce"}, "max_steps": 1}
    results = pretrain(out=tmp_path / "run", data=data, **given).results
    assert (results["objective"], results["method"], results["loss_parts"]) == ("infonce", "InfoNCE", [])
    assert read_run(tmp_path / "run")[2].name == "infonce"


def test_recall_is_in_the_log_in_the_results_and_in_the_card(run):
    results = json.loads((run / "results.json").read_text())
    names = [f"{way}_{what}" for way in ("image_to_text", "text_to_image") for what in ("recall_10", "median_rank")]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    measured = [one for one in log if names[0] in one]
    assert [one["step"] for one in measured] == [2, 4]
    assert all(results["image_text"][name] == measured[-1][name] for name in names)
    assert results["num_images"] == 32  # one has no caption
    card = (run / "README.md").read_text()
    assert "zero-shot-image-classification" in card
    assert f"| {results['image_text']['image_to_text_recall_10']:.3f} |" in card
    assert {"second_encoder_rank", "embedding_rank", "invariance"} <= log[0].keys()


@pytest.mark.parametrize("average", [0.0, pytest.param(0.5, marks=pytest.mark.slow)], ids=["weights", "average"])
def test_a_run_that_goes_on_from_its_checkpoint_ends_bitwise_the_same(average, run, data, flags, tmp_path):
    if average:
        run = pretrain(out=tmp_path / "whole", data=data, **flags, ema_decay=average).output_dir
    again = shutil.copytree(run, tmp_path / "again")
    for path in (again / "model.safetensors", again / "tokenizer.json"):
        path.unlink()
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    pretrain(out=again, data=data, **flags, ema_decay=average, resume_from_checkpoint="latest")
    for place in ("", "pretraining"):
        one, other = weights(run / place), weights(again / place)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert (run / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_pieces_make_the_same_run(weight, run, data, flags, tmp_path):
    flags = flags | {"vicreg": flags["vicreg"] | {"image_pair_weight": weight}}
    pieces = flags | {"batch_size": 4, "statistics_batch_size": 16, "max_steps": 1, "second_model": TEXTS}
    pieces["second_model"] = whole = TEXTS | {"dropout": 0.0, "attention_dropout": 0.0}
    losses = []
    for name, settings in (("pieces", pieces), ("whole", flags | {"max_steps": 1, "second_model": whole})):
        pretrain(out=tmp_path / name, data=data, **settings)
        losses.append(json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]))
    assert ("image_pair" in losses[0]) == (weight > 0)
    for name in ("loss", "invariance", "grad_norm", *["image_pair"] * (weight > 0)):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-4)  # float32, in another order


def test_a_second_view_needs_captions_beside_it(tiny_recipe, image_folder, tmp_path):
    flags = tiny_recipe | {"data": image_folder(16), "batch_size": 8}
    second = tiny_recipe["model"]
    for changes, message in (
        ({}, "`vicreg.image_pair_weight`|`image_pair_weight`: expected at least 0, and 0 without a `second_encoder`"),
        ({"second_model": second}, "`vicreg.image_pair_weight`: expected 0 without captions"),
    ):
        vicreg = flags.get("vicreg", {}) | {"image_pair_weight": 0.5}
        with pytest.raises(InputError, match=message):
            pretrain(out=tmp_path / "run", **flags | changes | {"vicreg": vicreg})
    assert not (tmp_path / "run").exists()


def test_a_pretrained_text_side_is_taken_frozen_and_said(data, flags, tmp_path, caplog):
    texts = [f"a {name} wall" for name in COLOURS]
    tokenizer = build_tokenizer(texts, 300)
    fields = {key: one for key, one in TEXTS.items() if key != "model_type"}
    source = DistilBertModel(DistilBertConfig(**fields | {"vocab_size": 400}))
    source.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    given = {key: one for key, one in flags.items() if key != "second_model"} | {"max_steps": 1}
    caplog.set_level("INFO")
    pretrain(out=tmp_path / "run", data=data, **given, text_model=str(tmp_path / "source"), freeze_text=True)
    kept = DistilBertModel.from_pretrained(tmp_path / "run" / "text_encoder").state_dict()
    assert all(torch.equal(one, kept[name]) for name, one in source.state_dict().items())
    for said in (
        "the mean of its tokens, padding left out",
        "its model 400: the others",
        "begins with the weights of",
    ):
        assert said in caplog.text
    assert "text_model: ./source" in (tmp_path / "run" / "README.md").read_text()
    # the other side: an encoder of a run's own, by its folder
    run = pretrain(
        out=tmp_path / "warm",
        data=data,
        model_name_or_path=str(tmp_path / "run"),
        **{key: one for key, one in given.items() if key not in ("model", "learning_rate")},
        text_model=str(tmp_path / "run"),
        learning_rate=0.0,
    )
    before, after = (
        AutoModel.from_pretrained(one, subfolder="image_encoder").state_dict()
        for one in (tmp_path / "run", run.output_dir)
    )
    assert all(torch.equal(one, after[name]) for name, one in before.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_column": None, "freeze_text": True}, "`freeze_text`: expected a `caption_column`"),
        ({"caption_column": None, "second_model": TEXTS}, "`second_model.model_type`: expected an encoder of images"),
        ({"freeze_text": True}, "`freeze_text`: expected a `text_model`"),
        ({"caption_column": ["nothing"]}, "`caption_column`: expected one of"),
        ({"second_model": {"model_type": "vit", "hidden_size": 16}}, "expected an encoder of texts, got 'vit'"),
        ({"second_model": {"model_type": "t5"}}, "expected an encoder of texts, got 't5'"),
        ({"second_model": CLIP}, "expected an encoder that tells texts apart, a 'clip_text_model'"),
        ({"text_model": "VIT"}, "`text_model`: expected a text encoder, got .* of type 'bigbird_vit'"),
        ({"text_model": "BERT"}, "`text_model`: expected a tokenizer in"),
        ({"streaming": True, "max_steps": 2}, "`caption_column`: expected a data set that is not streamed"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_bad_input_is_told_in_one_line(changes, message, data, flags, run, tmp_path):
    if changes.get("text_model") == "BERT":
        config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
        BertModel(config).save_pretrained(tmp_path / "bert")
    places = {"VIT": str(run / "image_encoder"), "BERT": str(tmp_path / "bert")}
    changes = {key: places.get(one, one) if isinstance(one, str) else one for key, one in changes.items()}
    given = {key: one for key, one in flags.items() if key != "second_model" or "text_model" not in changes}
    with pytest.raises(InputError, match=message) as raised:
        pretrain(out=tmp_path / "out", data=data, **given | changes)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_it_is_evaluated_and_searched(run, data, tmp_path, capsys, monkeypatch):
    arguments = ImageTextArguments(
        dataset_name=str(data),
        image_column_name="image",
        caption_column=["text", "text_de"],
        output_dir=str(tmp_path),
    )
    record = evaluate_image_text(str(run), arguments)
    results = json.loads((run / "results.json").read_text())["image_text"]
    assert record["metrics"] == pytest.approx(results)  # the run's own probe measures the same
    assert record["details"]["captions"] == 12 + 4
    assert "image to text recall 10" in capsys.readouterr().out
    place = tmp_path / "embeddings"
    rows = embed(str(data / "test"), run, place, num_workers=0, image_column_name=None)
    found = search(run, place, "a red wall", 3)
    assert len(found) == 3
    assert found[0].cosine >= found[1].cosine >= found[2].cosine
    model, processor = AutoModel.from_pretrained(run).eval(), AutoProcessor.from_pretrained(run)
    with torch.no_grad():
        words = model(**processor(text=["a red wall"], return_tensors="pt")).text_embeds[0]
    cosines = torch.nn.functional.normalize(torch.tensor(rows["embedding"][:]), dim=1) @ words
    assert rows["id"][int(cosines.argmax())] == found[0].id
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    explorer = open_explorer(place, run)
    assert explorer.takes_words
    by_page = explorer.near_words("a red wall", 3)
    assert [cosine for _, cosine in by_page] == pytest.approx([one.cosine for one in found], abs=1e-5)
    assert explorer.images.ids[by_page[0][0]] == found[0].id
    assert main(["search", str(run), str(place), "a red wall", "--num_results", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    for words, message in ((" ", "`WORDS`: expected some words"),):
        with pytest.raises(InputError, match=message):
            search(run, place, words)
    with pytest.raises(InputError, match="expected a model of images and texts"):
        search(run / "image_encoder", place, "red")
    with pytest.raises(InputError, match=r"has no embedding\.json"):
        search(run, tmp_path, "red")


@pytest.fixture
def classes(tmp_path):
    """Returns a function that writes walls of four classes, in two pictures each; the classes have names or not."""

    def make(label):
        images = [picture for picture in pictures() for _ in range(2)]
        columns = {"image": images, "other": images[::-1], "label": [number // 2 for number in range(8)]}
        features = datasets.Features({"image": datasets.Image(), "other": datasets.Image(), "label": label})
        rows = datasets.Dataset.from_dict(columns, features=features)
        datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "classes")
        return {"dataset_name": str(tmp_path / "classes"), "image_column_name": "image", "output_dir": str(tmp_path)}

    return make


def test_classes_are_told_by_their_names_and_pictures_by_others(run, classes):
    given = classes(datasets.ClassLabel(names=list(COLOURS)))
    flags = {"label_column_name": "label", "templates": ["a {} wall", "{}"], "second_image_column_name": "other"}
    metrics = evaluate_image_text(str(run), ImageTextArguments(**given, **flags))["metrics"]
    model, processor = AutoModel.from_pretrained(run).eval(), AutoProcessor.from_pretrained(run)
    right = 0
    for number, picture in enumerate(pictures()):
        scores = []
        for name in COLOURS:
            inputs = processor(images=picture, text=[f"a {name} wall", name], padding=True, return_tensors="pt")
            with torch.no_grad():
                scores.append(model(**inputs).logits_per_image.mean().item())
        right += scores.index(max(scores)) == number
    assert metrics["zero_shot_accuracy"] == right / 4
    assert metrics["raw_pixels_recall_1"] == 0.0  # each has a twin that is as near


def test_what_cannot_be_measured_is_told(run, data, classes, tmp_path):
    given = classes(datasets.Value("int64"))
    for flags, message in (
        ({}, "expected one of the two, got none; name what there is to measure"),
        ({"label_column_name": "label"}, "`class_names`: expected a name for each of 4 classes, got 0"),
        ({"label_column_name": "label", "class_names": list(COLOURS), "templates": ["wall"]}, "`templates`: expected"),
        ({"caption_column": ["label"]}, "`caption_column`: expected texts in column 'label'"),
        ({"caption_column": ["label"], "test_split": "x"}, r"`test_split`: expected one of \['test'\]"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_image_text(str(run), ImageTextArguments(**given, **flags))
    with pytest.raises(InputError, match="`dataset_name`: expected images with captions"):
        evaluate_image_text(str(run), ImageTextArguments())


def test_it_is_staged_with_its_tokenizer_and_its_code(run, tmp_path):
    staged = stage(run, tmp_path, repo="lab/walls")
    code = with_siblings({"modeling_vicreg_dual_encoder", "image_processing_bigbird_vit"})
    assert {f"{one}.py" for one in code} | {"tokenizer.json", "tokenizer_config.json"} <= set(staged.names)
    assert (tmp_path / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModelForZeroShotImageClassification"].endswith(".VicRegDualEncoder")
    assert {"image_encoder/", "text_encoder/", "checkpoints/"} <= set(staged.left_out)
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"`tokenizer\.json`: expected a tokenizer"):
        stage(broken, tmp_path / "broken" / "pretraining", repo="lab/walls")


@pytest.mark.slow
def test_a_published_folder_gives_equal_logits_with_and_without_the_package(run, capsys):
    assert main(["publish", str(run), "--repo", "lab/walls", "--dry_run"]) == 0
    assert "dry run: loads and is complete" in capsys.readouterr().out


@pytest.mark.distributed
def test_two_processes_train_like_one(run, data, flags, ranks, tmp_path):
    settings = flags | {"max_steps": 2, "second_model": TEXTS | {"dropout": 0.0, "attention_dropout": 0.0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    pretrain(out=tmp_path / "one", data=data, **settings)
    program = ["-m", "hf_vicreg.training.pretrain", data, "--config", tmp_path / "recipe.yaml"]
    done = ranks(2, *program, "--output_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for mine, other in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "image_to_text_median_rank"):
            if name in mine and "rank" not in name:
                assert other[name] == pytest.approx(mine[name], rel=1e-3)  # float32, in another order
