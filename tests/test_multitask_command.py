"""`hf-vicreg finetune multitask`: six tasks on one encoder; heads that load alone, resuming, bad input, the card."""

import json
import random
import re
import shlex
import shutil
import signal
import sys
import time

import datasets
import pytest
import torch
import transformers
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.publishing.staging import stage
from hf_vicreg.training.launch.distributed import build_accelerator
from hf_vicreg.training.tasks.arguments import MultitaskArguments
from hf_vicreg.training.tasks.multitask.command import prepare
from hf_vicreg.training.tasks.multitask.model import MultitaskModel
from hf_vicreg.training.tasks.multitask.tasks_file import read_tasks

COLOURS = {"ball": (230, 60, 40), "box": (40, 90, 230)}
AUTO_CLASSES = {
    "first": "AutoModelForImageClassification",
    "shown": "AutoModelForImageClassification",
    "area": "AutoModelForImageClassification",
    "boxes": "AutoModelForObjectDetection",
    "masks": "AutoModelForSemanticSegmentation",
    "says": "VisionEncoderDecoderModel",
}
CANVAS = {"image_height": 24, "image_width": 32}
TASKS = [
    {"name": "first", "kind": "classification", "label_column_name": "first"},
    {"name": "shown", "kind": "multi_label_classification", "label_column_name": "shown"},
    {"name": "area", "kind": "regression", "label_column_name": "area"},
    {"name": "boxes", "kind": "detection", "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 4}
    | CANVAS,
    {"name": "masks", "kind": "segmentation", "decoder_hidden_size": 32} | CANVAS,
    {
        "name": "says",
        "kind": "captioning",
        "decoder_hidden_size": 32,
        "decoder_layers": 1,
        "max_target_length": 4,
        "vocab_size": 260,
    },
]
FLAGS = [
    "--weighting",
    "uncertainty",
    "--batch_size",
    "6",
    "--max_steps",
    "2",
    "--checkpointing_steps",
    "1",
    "--logging_steps",
    "1",
]


def row(split, number):
    """A picture of two squares, and what is said of it in six ways."""
    rng = random.Random(f"{split}/{number}")
    image, mask, boxes = Image.new("RGB", (32, 24), (200, 200, 190)), Image.new("L", (32, 24)), []
    names = [sorted(COLOURS)[number % 2], rng.choice(sorted(COLOURS))]
    for place, name in enumerate(names):
        width, height = rng.randint(6, 10), rng.randint(6, 10)
        left, top = 16 * place + rng.randint(0, 15 - width), rng.randint(0, 23 - height)
        corners = (left, top, left + width - 1, top + height - 1)
        ImageDraw.Draw(image).rectangle(corners, fill=COLOURS[name])
        ImageDraw.Draw(mask).rectangle(corners, fill=1 + sorted(COLOURS).index(name))
        boxes.append([left, top, width, height])
    area = float(sum(width * height for _, _, width, height in boxes))
    return {
        "image": image,
        "first": names[0],
        "shown": sorted(set(names)),
        "area": area,
        "objects": {"bbox": boxes, "category": names},
        "gaps": {"bbox": boxes, "category": [0, 2]},
        "mask": mask,
        "text": f"a {names[0]}",
    }


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with an encoder, a data set of six columns, and `tasks.yaml`."""
    folder = tmp_path_factory.mktemp("multitask")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BigBirdViTModel(BigBirdViTConfig(image_size=16, patch_size=8, tile_size=1, **shape)).save_pretrained(
        folder / "mine"
    )
    BigBirdViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "mine")
    splits = {}
    for split, count in (("train", 6), ("test", 2)):
        rows = [row(split, number) for number in range(count)]
        columns = datasets.Dataset.from_dict({key: [one[key] for one in rows] for key in rows[0]})
        splits[split] = columns.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    datasets.DatasetDict(splits).save_to_disk(folder / "data")
    write_tasks(folder / "tasks.yaml", TASKS)
    return folder


def write_tasks(path, tasks, model="mine", **common):
    tasks = [{"dataset_name": "data", "image_column_name": "image"} | common | one for one in tasks]
    path.write_text(yaml.safe_dump({"model": model, "tasks": tasks}, sort_keys=False))


@pytest.fixture(autouse=True)
def _at_work(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


@pytest.fixture(scope="module")
def trained(workplace):
    """A folder after two steps on all six tasks, and what was printed."""
    import contextlib
    import io

    printed, threads = io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(workplace)
        assert main(["finetune", "multitask", "tasks.yaml", "--output_dir", "six", *FLAGS]) == 0
    torch.set_num_threads(threads)
    return workplace / "six", printed.getvalue()


def record_of(folder):
    (record,) = json.loads((folder / "results.json").read_text())["evaluations"]
    return record


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_log_and_results_name_each_task(trained, workplace):
    folder, _ = trained
    first, second, last = log_of(folder)
    assert {f"{name}.loss" for name in AUTO_CLASSES} | {f"{name}.weight" for name in AUTO_CLASSES} <= first.keys()
    assert (first["area.weight"], first["says.weight"]) == (0.5, 1.0)  # a squared error is half a Gaussian's
    assert first["loss"] == pytest.approx(
        sum(first[f"{name}.weight"] * first[f"{name}.loss"] for name in AUTO_CLASSES)
    )
    assert second["says.weight"] != 1.0
    record = record_of(folder)
    metrics = record["metrics"]
    assert {one.partition(".")[0] for one in metrics} == set(AUTO_CLASSES)
    assert {"first.accuracy", "shown.f1", "area.mae", "boxes.map_50", "masks.mean_iou", "says.exact_match"} <= set(
        metrics
    )
    assert {key: last[key] for key in metrics} == metrics
    assert record["task"] == "finetune_multitask"
    assert record["details"]["tasks"]["boxes"]["images_a_step"] == 1
    assert record["data"]["tasks"]["area"]["label_column"] == "area"
    assert record["data"]["num_train"] == 36
    everything = "".join(path.read_text() for path in folder.rglob("*.json") if "checkpoints" not in path.parts)
    assert str(workplace) not in everything


def test_every_head_loads_alone_and_gives_what_it_gave_among_the_others(trained, workplace):
    folder, printed = trained
    arguments = MultitaskArguments(output_dir="elsewhere")
    name, listed = read_tasks("tasks.yaml", arguments)
    accelerator = build_accelerator("no")
    tasks = {one.name: prepare(name, one, accelerator) for one in listed}
    ones = dict.fromkeys(tasks, 1.0)
    heads = {name: task.model for name, task in tasks.items()}
    whole = MultitaskModel(BigBirdViTModel.from_pretrained("mine"), heads, ones, ones, None)
    whole.load_state_dict(load_file(folder / "checkpoints" / "step_00000002" / "model.safetensors"))
    for task in tasks.values():
        task.finish()  # a regression's units
    whole.eval()
    names: dict[str, object] = {}
    exec(printed.split("To use the heads:\n\n")[1], names)  # as it is printed
    encoder = transformers.AutoModel.from_pretrained(folder)
    for name, task in tasks.items():
        alone = names[name]
        loaded = getattr(transformers, AUTO_CLASSES[name]).from_pretrained(folder / "heads" / name).eval()
        assert type(alone) is type(loaded) is type(task.model)
        processor = transformers.AutoImageProcessor.from_pretrained(folder / "heads" / name)
        inputs = dict(processor([row("test", 0)["image"]], return_tensors="pt"))
        inputs |= {"decoder_input_ids": torch.tensor([[1, 2]])} if name == "says" else {}
        with torch.no_grad():
            one, other = loaded(**inputs), whole.heads[name](**inputs)
        assert torch.equal(one.logits, other.logits), name
        if name == "boxes":
            assert torch.equal(one.pred_boxes, other.pred_boxes)
        own = {id(parameter) for parameter in whole.encoder.parameters()}
        shared = {key: value for key, value in task.model.named_parameters() if id(value) in own}
        held = dict(loaded.named_parameters())
        assert len(shared) >= len(own) - 2
        assert all(torch.equal(held[key], value) for key, value in shared.items())
    assert transformers.AutoTokenizer.from_pretrained(folder / "heads" / "says")("a ball")["input_ids"]
    assert all(torch.equal(one, encoder.state_dict()[key]) for key, one in whole.encoder.state_dict().items())
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():  # one pass of the encoder for all linear heads
        assert torch.equal(names["first"].classifier(encoder(pixels).pooler_output), names["first"](pixels).logits)
    start = BigBirdViTModel.from_pretrained("mine").state_dict()
    assert not torch.equal(start["layernorm.weight"], encoder.state_dict()["layernorm.weight"])
    regression = transformers.AutoConfig.from_pretrained(folder / "heads" / "area")
    assert (regression.problem_type, regression.num_labels) == ("regression", 1)
    errors = []
    for number in range(2):  # in the units of the column, without anything beside the folder
        shown = row("test", number)
        processor = transformers.AutoImageProcessor.from_pretrained(folder / "heads" / "area")
        with torch.no_grad():
            said = names["area"](**processor([shown["image"]], return_tensors="pt")).logits.item()
        errors.append(abs(said - shown["area"]))
    assert sum(errors) / 2 == pytest.approx(record_of(folder)["metrics"]["area.mae"], rel=1e-4)


def test_a_resumed_run_is_the_same_and_a_task_alone_begins_like_among_others(trained, workplace):
    folder, _ = trained
    shutil.copytree("six", "resumed")
    shutil.rmtree("resumed/checkpoints/step_00000002")
    shutil.rmtree("resumed/heads")
    for name in ("model.safetensors", "results.json"):
        (workplace / "resumed" / name).unlink()
    torch.manual_seed(7)  # the captioner drops activations: its generator's state has to come back
    again = ["finetune", "multitask", "tasks.yaml", "--output_dir", "resumed", *FLAGS]
    assert main(again) == 2  # not without being asked to
    assert main([*again, "--resume_from_checkpoint", "latest", "--only", "area"]) == 2  # nor as another run
    assert main([*again, "--resume_from_checkpoint", "latest"]) == 0
    for path in sorted(folder.rglob("*.safetensors")):
        assert path.read_bytes() == (workplace / "resumed" / path.relative_to(folder)).read_bytes(), path
    assert main([*again[: -len(FLAGS) - 1], "alone", *FLAGS, "--only", "area"]) == 0
    assert not (workplace / "alone" / "heads" / "says").exists()
    whole, alone = log_of(folder)[0], log_of(workplace / "alone")[0]
    assert (whole["area.loss"], whole["epoch"]) == (alone["area.loss"], alone["epoch"])


def test_fixed_weights_weigh(workplace):
    write_tasks(workplace / "fixed.yaml", [TASKS[0] | {"weight": 3}, TASKS[2] | {"weight": 0.25}])
    assert main(["finetune", "multitask", "fixed.yaml", "--output_dir", "fixed", *FLAGS[2:]]) == 0
    line, *_ = log_of(workplace / "fixed")
    assert line["loss"] == pytest.approx(3 * line["first.loss"] + 0.25 * line["area.loss"])
    assert record_of(workplace / "fixed")["details"]["tasks"]["first"]["images_a_step"] == 3


def test_what_is_published_is_the_encoder_and_its_card_names_the_tasks(trained, tmp_path):
    folder, _ = trained
    staged = stage(folder, tmp_path, repo="me/six")
    assert "heads/" in staged.left_out
    assert all(f"`{name}`" in staged.card for name in AUTO_CLASSES)
    assert "fine-tuned for several tasks at once" in staged.card
    assert "TASKS.yaml --batch_size 6" in staged.card
    assert "without labels" not in staged.card


@pytest.mark.slow
def test_publishing_without_sending_works(trained, capsys):
    assert main(["publish", "six", "--repo", "me/six", "--dry_run"]) == 0
    assert "dry run: loads and is complete" in capsys.readouterr().out
    assert main(["publish", "six/heads/area", "--repo", "me/area", "--dry_run"]) == 0
    assert "gives 1 number(s) for an image" in capsys.readouterr().out
    assert main(["publish", "six/heads/boxes", "--repo", "me/boxes", "--dry_run"]) == 2
    assert "holds a 'deformable_detr'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_the_same(workplace, ranks):
    # a captioner drops other activations on each process, a segmenter's batch norms see each process's images alone
    tasks = [one for one in TASKS if one["kind"] not in ("captioning", "segmentation")]
    write_tasks(workplace / "two.yaml", tasks, str(workplace / "mine"), dataset_name=str(workplace / "data"))
    flags = f"finetune multitask {workplace}/two.yaml --batch_size 16 --max_steps 3 --max_grad_norm 0"
    assert main([*flags.split(), "--output_dir", "by_one"]) == 0
    finished = ranks(2, "-m", "hf_vicreg.cli", *flags.split(), "--output_dir", workplace / "by_two")
    assert finished.returncode == 0, finished.stderr
    assert record_of(workplace / "by_two")["details"]["processes"] == 2
    assert record_of(workplace / "by_two")["details"]["tasks"]["boxes"]["images_a_step"] == 4
    one, two = record_of(workplace / "by_one")["metrics"], record_of(workplace / "by_two")["metrics"]
    assert one == pytest.approx(two, abs=1e-3)
    for path in ("", *(f"heads/{task['name']}" for task in tasks)):
        one, two = (load_file(workplace / name / path / "model.safetensors") for name in ("by_one", "by_two"))
        difference = sum((one[key] - two[key]).double().square().sum() for key in one).sqrt()
        whole = sum(tensor.double().square().sum() for tensor in one.values()).sqrt()
        assert difference < 1e-5 * whole, path


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(workplace, run_process):
    program = [sys.executable, "-m", "hf_vicreg.cli", "finetune", "multitask", workplace / "killed.yaml"]
    write_tasks(workplace / "killed.yaml", TASKS, str(workplace / "mine"), dataset_name=str(workplace / "data"))
    flags = [
        *FLAGS[:2],
        "--batch_size",
        "6",
        "--max_steps",
        "24",
        "--checkpointing_steps",
        "3",
        "--logging_steps",
        "1",
    ]
    whole, killed = (["--output_dir", workplace / name] for name in ("not_killed", "killed"))
    finished = run_process([*program, *flags, *whole])
    assert finished.returncode == 0, finished.stderr
    process = run_process.start([*program, *flags, *killed])
    end = time.monotonic() + 200
    while not (workplace / "killed" / "checkpoints" / "step_00000006").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (workplace / "killed" / "results.json").exists()
    finished = run_process([*program, *flags, *killed, "--resume_from_checkpoint", "latest"])
    assert finished.returncode == 0, finished.stderr
    paths = ["model.safetensors", *(f"heads/{name}/model.safetensors" for name in AUTO_CLASSES)]
    for path in paths:
        assert (workplace / "not_killed" / path).read_bytes() == (workplace / "killed" / path).read_bytes(), path


BAD = {
    "no-column": (
        [TASKS[0] | {"label_column_name": "kind"}],
        {},
        "`first.label_column_name`: expected a column 'kind'",
    ),
    "no-boxes": ([TASKS[3] | {"objects_column_name": "boxes"}], {}, "`boxes.objects_column_name`: expected a column"),
    "no-folder": (
        [TASKS[0] | {"dataset_name": "no/such/data"}],
        {},
        "`first.dataset_name`: expected a Hub id or an ex",
    ),
    "no-model": (TASKS[:1], {"model": "nowhere"}, "`model`: expected the folder or Hub id of a vision model"),
    "texts": (
        [TASKS[2] | {"label_column_name": "text"}],
        {},
        "`area.label_column_name`: expected a number, got 'a ba",
    ),
    "same-name": ([TASKS[0], TASKS[2] | {"name": "first"}], {}, "`tasks`: expected names that differ in bad.yaml"),
    "no-such-pixel": (
        [TASKS[4] | {"class_names": "ground,ball,box,cat"}],
        {},
        "each of 4 classes, found none of 'cat'",
    ),
    "no-such-box": (
        [TASKS[3] | {"objects_column_name": "gaps"}],
        {},
        "`boxes.objects_column_name`: expected training",
    ),
    "batch": (TASKS, {}, "`batch_size`: expected at least 6, an image of each of 6 tasks"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case, workplace, capsys):
    tasks, more, message = BAD[case]
    write_tasks(workplace / "bad.yaml", tasks, **more)
    flags = ["--batch_size", "5"] if case == "batch" else []
    assert main(["finetune", "multitask", "bad.yaml", "--output_dir", "o", *flags]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert message in line
    assert not (workplace / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml", "--output_dir", "o"], "`TASKS`: expected a YAML file, got 'none.yaml'"),
        (["tasks.yaml"], "`output_dir`: expected a folder for the model, got none"),
        (["tasks.yaml", "--output_dir", "mine"], "`output_dir`: expected a new or empty folder"),
        (
            ["tasks.yaml", "--output_dir", "o", "--temperature", "0.5"],
            "`temperature`: expected a number of at least 1",
        ),
        (["tasks.yaml", "--output_dir", "o", "--only", "seen"], "`only`: expected one of the tasks first, shown"),
    ],
    ids=["no-file", "no-output", "not-empty", "temperature", "only"],
)
def test_bad_flags_get_one_line(arguments, message, workplace, capsys):
    assert main(["finetune", "multitask", *arguments]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert message in line
    assert not (workplace / "o").exists()


def test_the_example_of_help_is_a_command(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "multitask", "--help"])
    (line,) = re.findall(r"^example:\n\s+(hf-vicreg .*)$", capsys.readouterr().out, re.MULTILINE)
    assert shlex.split(line)[1:4] == ["finetune", "multitask", "tasks.yaml"]
