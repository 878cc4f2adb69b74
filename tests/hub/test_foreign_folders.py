"""A folder from somebody else: whatever its files say, none of it runs, breaks a page or steers a terminal."""

import io
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from hf_vicreg import BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.model_cards.card import CardFacts, model_card
from hf_vicreg.model_cards.escaping import STEERING
from hf_vicreg.model_cards.schema import FileError, check_config, check_recipe, check_results
from hf_vicreg.publishing.staging import stage
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_vision_encoder
from hf_vicreg.training.evaluation.results import read_results

# the file that planted code would make, wherever it runs: models are loaded in processes with a folder of their own
MARK = str(Path(tempfile.gettempdir()) / f"planted_code_ran_{os.getpid()}")
RUNS = f"open({MARK!r}, 'w').close()"
PAGE = "<img src=x onerror=alert(1)>[x](javascript:alert(1))`|\n\n# big\n\n---\n\n```\n<script>1</script>\x1b[2J\u202e"
PAGES = MarkdownIt("commonmark", {"html": True}).enable("table")
EVIL = f"""
{RUNS}
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
class EvilConfig(PretrainedConfig): model_type = "bigbird_vit"
class EvilModel(PreTrainedModel): config_class = EvilConfig
"""


def in_json(file, **values):
    """Returns a function that sets fields of a JSON file of a folder."""

    def plant(run):
        (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | values))

    return plant


def in_recipe(**values):
    def plant(run):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | values))

    return plant


def in_evaluation(**values):
    one = {"task": "linear", "data": {"dataset": "digits", "num_test": 5}, "metrics": {"accuracy": 0.5}}
    return in_json("results.json", evaluations=[one | values])


def in_log(line):
    def plant(run):
        with (run / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    return plant


def as_text(file, content):
    return lambda run: (run / file).write_text(content)


def a_link(file):
    """Returns a function that makes a file a link to another's."""

    def plant(run):
        (run.parent / "private.json").write_text('{"dataset": "PRIVATE"}')
        (run / file).unlink(missing_ok=True)
        (run / file).symlink_to(run.parent / "private.json")

    return plant


def postscript(run):
    Image.new("RGB", (8, 8)).save(run / "neighbours.png", format="EPS")


def own_code(run):
    (run / "evil.py").write_text(EVIL)
    (run / "modeling_bigbird_vit.py").write_text(EVIL)
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    in_json("config.json", auto_map=classes)(run)
    in_json("preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.EvilModel"})(run)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "code in features": in_json("results.json", features=f"32)\n{RUNS}\n# ("),
    "features without end": in_json("results.json", features=10**400),
    "a shell in a data set": in_json("results.json", hub_dataset=f"x; touch {MARK}"),
    "a page in a number": in_json("results.json", num_images=PAGE),
    "a shell in a task": in_evaluation(task=f"$(touch {MARK})"),
    "a page in a metric": in_evaluation(metrics={PAGE: 0.5}),
    "a shell in a flag": in_evaluation(settings={f"x; touch {MARK} #": 1}),
    "a path in a picture": in_evaluation(pictures=["../../secret.png"]),
    "a page in a class": in_json("config.json", architectures=[f"{PAGE}ForImageClassification"]),
    "a path in a type": in_json("config.json", model_type="../../x"),
    "layers without end": in_json("config.json", num_hidden_layers=10**9),
    "an image without end": in_json("config.json", image_size=2**40),
    "attention of others": in_json("config.json", _attn_implementation="somebody/kernels"),
    "a page in a second type": in_recipe(second_model={"model_type": PAGE}),
    "YAML that calls": as_text("recipe.yaml", f"seed: !!python/object/apply:os.system ['touch {MARK}']\n"),
    "YAML that grows": as_text("recipe.yaml", BOMB + "model: *i\n"),
    "YAML that holds itself": as_text("recipe.yaml", "model: &a {b: *a}\n"),
    "JSON without end": as_text("results.json", '{"a":' * 200_000),
    "results by a link": a_link("results.json"),
    "a log by a link": a_link("log.jsonl"),
    "another program's picture": postscript,
}
LARGE = ("layers without end", "an image without end")  # transformers would begin to build them
TAMED = {
    "a page in a data set": in_json("results.json", dataset=PAGE),
    "a shell in a name": in_json("results.json", dataset=f"x'; touch {MARK}; `touch {MARK}`"),
    "a page in the hardware": in_json("results.json", hardware=PAGE),
    "a page in an evaluation": in_evaluation(
        data={"dataset": PAGE, "num_test": 5, "class_names": [PAGE]},
        settings={"labels": [PAGE, f"$(touch {MARK})"]},
        environment={"hardware": PAGE},
        details={"samples": [{"written": PAGE}], "pretrained_model": PAGE},
    ),
    "a page in a verdict": in_json("results.json", verdicts=[{"name": PAGE, "finding": PAGE, "step": 1}]),
    "a page in the recipe": in_recipe(train_split=PAGE, image_column_name="```\n<script>"),
    "a page in a key": in_json("config.json", id2label={"0": PAGE}, **{PAGE[:40]: PAGE}),
    "numbers that are none": in_json("results.json", knn_accuracy={"trained": float("nan")}, training_seconds=1e999),
    "a log of text": in_log(json.dumps({"step": 3, "loss": PAGE, "invariance": [1], PAGE: 1})),
    "a log of no numbers": in_log('{"step": 1e999, "loss": 1}\n{"step": true}\n[]\n' + "[" * 200_000),
    "names of files": lambda run: (run / "\x1b]0;owned\x07\x1b[2J.txt").write_text("x"),
    "pipelines of others": in_json("config.json", custom_pipelines={"image-classification": {"impl": "a/b--c.D"}}),
    "its own code": own_code,
}


@pytest.fixture
def run(run_folder, tmp_path, monkeypatch):
    """A copy of a run, to be planted in; the process works in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "pretraining"))
    yield folder
    assert not Path(MARK).exists()


def check_page(card):
    """Fail for a card whose metadata cannot be read, or that shows anything of theirs but as text."""
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    data = yaml.safe_load(front)
    assert isinstance(data, dict)
    assert data["library_name"] == "transformers"
    assert ModelCard(card).data.library_name == "transformers"
    assert not STEERING.search(card)
    tokens = [one for token in PAGES.parse(body) for one in (token, *(token.children or []))]
    html = [one.content.strip() for one in tokens if one.type.startswith("html")]
    assert all(one.startswith("<!-- ") and one.endswith("-->") and one.count("<") == 1 for one in html), html
    assert [one.attrs["href"] for one in tokens if one.type == "link_open"] == []
    pictures = {one.attrs["src"] for one in tokens if one.type == "image"}
    assert pictures <= {"training_curves.png", "attention_pattern.png", "neighbours.png"}
    headings = [one for one in tokens if one.type == "heading_open"]
    assert len(headings) == 7
    blocks = [one.info for one in tokens if one.type == "fence"]
    assert blocks == ["python", "bash", "yaml", "bibtex"]
    for row in [line for line in body.splitlines() if line.startswith("| ")]:
        assert row.replace("\\|", "").count("|") in (3, 5), row
    (shell,) = (one.content for one in tokens if one.type == "fence" and one.info == "bash")
    assert shell.count("\n") == 1


def one_plain_line(printed):
    assert not STEERING.search(printed), printed
    (line,) = printed.splitlines()
    assert line.startswith("error: "), line
    assert MARK not in line


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_value_of_its_field_is_refused_in_a_line(name, run, capsys):
    REFUSED[name](run)
    assert main(["publish", str(run), "--repo", "lab/demo", "--dry_run"]) == 2
    one_plain_line(capsys.readouterr().err)


@pytest.mark.parametrize("name", TAMED)
def test_what_may_be_any_text_is_shown_as_text(name, run, tmp_path):
    TAMED[name](run)
    (tmp_path / "staged").mkdir()
    staged = stage(run, tmp_path / "staged", repo="lab/demo")
    check_page(staged.card)
    assert "evil.py" not in staged.names
    for file in staged.names:
        if file.endswith(".json"):
            content = (staged.folder / file).read_text()
            assert "evil" not in content
            assert "custom_pipelines" not in content
            value = json.loads(content, parse_constant=pytest.fail)  # NaN and the like are no JSON
            assert not STEERING.search(json.dumps(value, ensure_ascii=False))


def test_all_of_it_at_once_is_published_and_nothing_runs(run, capsys):
    """One folder with everything that is not refused, through the real checks: their code is in it, ours is run."""
    for plant in TAMED.values():
        plant(run)
    in_json("results.json", dataset=PAGE)(run)
    assert main(["publish", str(run), "--repo", "lab/demo", "--dry_run"]) == 0
    captured = capsys.readouterr()
    assert not STEERING.search(captured.out + captured.err)
    assert "evil.py" in captured.out  # among what is left out
    assert "\\x1b]0;owned\\x07" in captured.out


@pytest.mark.slow
@pytest.mark.parametrize("name", TAMED)
def test_each_of_it_alone_is_published_and_nothing_runs(name, run, capsys):
    TAMED[name](run)
    assert main(["publish", str(run), "--repo", "lab/demo", "--dry_run"]) == 0
    assert not STEERING.search("".join(capsys.readouterr()))


@pytest.mark.parametrize("does", ["inspect cost", "convert", "from_dense"])
def test_nothing_asks_whether_to_run_code_beside_the_weights(does, run, monkeypatch, capsys):
    """At a terminal transformers would ask, and one key would run it."""
    own_code(run)
    in_json("config.json", model_type="evil")(run)
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr("sys.stdin", answers)
    if does == "from_dense":
        with pytest.raises(ValueError, match="custom code"):
            BigBirdViTModel.from_dense(run)
    else:
        assert main([*does.split(), str(run), *["out"] * (does == "convert")]) == 2
        one_plain_line(capsys.readouterr().err)
    assert answers.tell() == 0


@pytest.mark.parametrize("name", REFUSED | TAMED)
def test_doctor_evaluation_and_card_take_it_as_data(name, run, run_folder, capsys):
    (REFUSED | TAMED)[name](run)
    code = main(["doctor", str(run)])
    printed = capsys.readouterr()
    assert not STEERING.search(printed.out + printed.err)
    if code == 2:
        one_plain_line(printed.err)
    told(InputError, read_results, run)  # as `hf-vicreg evaluate` does before it adds to them
    if json_of(run / "config.json") != json_of(run_folder / "config.json") and name not in LARGE:
        told(InputError, load_vision_encoder, str(run))
    facts = told(
        FileError,
        CardFacts,
        name=f'x"); {RUNS} #',
        config=json_of(run / "config.json"),
        results=json_of(run / "results.json"),
        recipe=recipe_of(run),
    )
    if facts is not None:
        check_page(model_card(facts))


def told(kind, do, *arguments, **named):
    """What a function returns, None if it refuses its input in one line."""
    try:
        return do(*arguments, **named)
    except kind as error:
        message = str(error)
    assert "\n" not in message
    assert MARK not in message
    return None


def json_of(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}


def recipe_of(run):
    try:
        return yaml.safe_load((run / "recipe.yaml").read_text()) | {"batch_size": 8}
    except (yaml.YAMLError, TypeError):
        return {"batch_size": 8}


def test_a_folder_named_like_code_is_a_string_in_the_snippet():
    name = f'x"); {RUNS} #\n```\n<script>'
    card = model_card(CardFacts(name=name, config={"model_type": "bigbird_vit"}, recipe={"batch_size": 8}))
    check_page(card)
    code = card.split("```python\n")[1].split("\n```")[0]
    strings = []
    names = {"images": [], "AutoImageProcessor": None}
    lines = [line for line in code.splitlines() if line.startswith("processor, model")]
    loader = type("Loader", (), {"from_pretrained": staticmethod(strings.append)})
    exec(lines[0], names | {"AutoImageProcessor": loader, "AutoModel": loader})
    assert strings == [" ".join(name.split())] * 2


def test_tasks_of_others_are_text_on_a_card():
    task = {"kind": PAGE, "dataset_name": PAGE, "images_a_step": PAGE, "loss_weight": [PAGE]}
    record = {"task": "finetune_multitask", "details": {"tasks": {PAGE[:60]: task, "none": PAGE}}}
    card = model_card(CardFacts(name="x", config={"model_type": "bigbird_vit"}, results={"evaluations": [record]}))
    assert "fine-tuned for several tasks" in card
    assert not STEERING.search(card)
    body = card.removeprefix("---\n").split("\n---\n", 1)[1]
    tokens = [one for token in PAGES.parse(body) for one in (token, *(token.children or []))]
    assert not [one for one in tokens if one.type == "link_open"]
    assert all(one.content.startswith("<!-- ") for one in tokens if one.type.startswith("html"))
    assert len([one for one in tokens if one.type == "heading_open"]) == 7
    (row,) = (line for line in body.splitlines() if line.startswith("| ") and "onerror" in line)
    assert row.replace("\\|", "").count("|") == 6


def test_what_a_run_writes_passes_the_schema_whole(run_folder):
    """A field that the package writes and the schema does not know would be lost in publishing: name it there."""
    results = json.loads((run_folder / "results.json").read_text())
    assert check_results(results) == results
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    assert check_recipe(recipe) == recipe
    config = json.loads((run_folder / "config.json").read_text())
    assert check_config(config) == config


def test_class_names_on_the_screen_and_in_pictures_are_text(run_folder, tmp_path, capsys):
    from hf_vicreg.training.evaluation.pictures import draw_confusion, draw_neighbours
    from hf_vicreg.training.tasks.arguments import DetectionArguments
    from hf_vicreg.training.tasks.detection.box_drawing import draw_boxes
    from hf_vicreg.training.tasks.detection.model import build_detector, build_detector_processor

    torch = pytest.importorskip("torch")
    names = [PAGE, "$x^{$", "\x1b[31mred"]
    arguments = DetectionArguments(dataset_name="x", output_dir="y")
    detector = build_detector(str(run_folder), names, arguments)
    detector.save_pretrained(tmp_path / "detector")
    processor = build_detector_processor(str(run_folder), detector.config.backbone_config, 64, 64)
    processor.save_pretrained(tmp_path / "detector")
    capsys.readouterr()
    image = tmp_path / "photo\x1b[2J.png"
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(image)
    command = ["detect", str(tmp_path / "detector"), str(image), "--output", str(tmp_path / "out"), "--threshold", "0"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a font without these letters
        assert main(command) == 0
    printed = capsys.readouterr()
    assert "objects" in printed.out
    assert not STEERING.search(printed.out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw_confusion(tmp_path / "c.png", torch.eye(3, dtype=torch.int64), names, "$x^{$")
        picture = Image.new("RGB", (8, 8))
        draw_neighbours(tmp_path / "n.png", [(picture, names[1], [(picture, names[1], 0.5, True)])], "$x^{$")
    assert draw_boxes(picture, [], [], []).size == (8, 8)
