"""What a user can get wrong, verb by verb: one line and exit code 2. What we get wrong keeps its traceback."""

import errno
import json
import os
import sys

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.training.errors import InputError, blamed_on, place_for

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
LONG = "n" * 300
KNN = "evaluate knn"
LABELLED = "--dataset_name labelled"
DETECTION = "finetune detection encoder --dataset_name labelled"
MISTAKES = {
    "cost, no model": ("inspect cost nowhere", "`MODEL`: expected the folder or Hub id of a vision model"),
    "cost, damaged": ("inspect cost damaged", "`MODEL`: expected the folder or Hub id of a vision model"),
    "cost, bad field": ("inspect cost field", "`window_size`: expected an odd number of tiles"),
    "cost, another model": ("inspect cost vit", "`MODEL`: expected a model of type 'bigbird_vit', got 'vit'"),
    "cost, too small": ("inspect cost encoder --height 3", "expected an image of at least one patch (8, 8)"),
    "cost, too large": ("inspect cost encoder --height 32000 --width 32000", "expected at most 4096 tiles"),
    "pattern, no layer": ("inspect pattern encoder --layer 9", "`--layer`: expected 0 to 0, got 9"),
    "pattern, no folder": ("inspect pattern encoder --output no/a.svg", "`output`: expected a file to write, got"),
    "pattern, a folder": ("inspect pattern encoder --output empty", "`output`: expected a file to write, got 'empty'"),
    "convert, no model": ("convert nowhere out", "`SOURCE`: expected the folder or Hub id of a vision model"),
    "convert, damaged": ("convert damaged out", "`SOURCE`: expected the folder or Hub id of a vision model"),
    "convert, no weights": ("convert bare out", "`SOURCE`: "),
    "convert, bad weights": ("convert broken out", "`source`: expected weights and a configuration that load"),
    "convert, another": ("convert encoder out", "`source`: expected a model of type vit, dinov2"),
    "convert, bad pattern": ("convert vit out --window_size 2", "`window_size`: expected an odd number"),
    "convert, no image": ("convert vit out --images corrupt", "`images`: expected images that can be read"),
    "convert, no images": ("convert vit out --images empty", "`images`: expected a folder with images, got none"),
    "convert, size": ("convert vit out --image_sizes 2", "`image_sizes`: expected at least one patch (8, 8)"),
    "convert, full folder": ("convert vit encoder", "`OUT`: expected a new or empty folder, got 'encoder'"),
    "convert, in a file": ("convert vit note.txt/out", "`OUT`: expected a folder in a folder"),
    "convert, long name": (f"convert vit {LONG}", "`OUT`: expected a path that can be used, got 'nnn"),
    "publish, no run": ("publish nowhere --repo me/it --dry_run", "`RUN`: expected the folder of a run"),
    "publish, no owner": ("publish encoder --repo it --dry_run", "`repo`: expected OWNER/NAME, got 'it'"),
    "publish, name": ("publish encoder --repo me/a--b --dry_run", "`repo`: expected OWNER/NAME, got 'me/a--b'"),
    "publish, damaged": ("publish damaged --repo me/it --dry_run", "`RUN`: expected the folder of a run or a fine-"),
    "publish, bad field": ("publish field --repo me/it --dry_run", "`config.json`: "),
    "publish, log": ("publish log --repo me/it --dry_run", "`log.jsonl`: expected lines of JSON in log"),
    "publish, wrapper": ("publish encoder --repo me/it --dry_run --include_pretraining", "`include_pretraining`: "),
    "doctor, no run": ("doctor nowhere", "`RUN`: expected the folder of a run, nowhere has no recipe.yaml"),
    "doctor, no lines": ("doctor young", "`RUN`: expected lines of training steps in young/log.jsonl"),
    "doctor, long name": (f"doctor {LONG}", "`RUN`: expected a path that can be used"),
    "prepare, no images": ("prepare empty out", "`dataset_name`: expected a folder with data files, got empty"),
    "prepare, no source": ("prepare no/such/place out", "`dataset_name`: expected a Hub id or an existing folder"),
    "prepare, size": ("prepare corrupt out --size 0", "`size`: expected at least 1 pixel, got 0"),
    "prepare, full folder": ("prepare photos encoder", "`out`: expected a new or empty folder"),
    "prepare, in a file": ("prepare photos note.txt/out", "`OUT`: expected a path that can be used"),
    "embed, no images": ("embed no/such/place encoder out", "`data`: expected a folder of images"),
    "embed, no model": ("embed photos nowhere out", "`MODEL`: expected the folder or Hub id of a vision model"),
    "embed, batch": ("embed photos encoder out --batch_size 0", "`batch_size`: expected an integer of at least 1"),
    "embed, processes": ("embed photos encoder out --num_processes 0", "`num_processes`: expected 1 to 64, got 0"),
    "embed, full folder": ("embed photos encoder encoder", "`OUT`: expected a new folder or one with embedding.json"),
    "embed, in a file": ("embed photos encoder note.txt/out", "`OUT`: expected a path that can be used"),
    "explore, no images": ("explore empty encoder", "`IMAGES`: expected files of images in empty, found no file"),
    "explore, near name": ("explore photoz encoder", "`IMAGES`: expected a folder of images, a `datasets` folder"),
    "explore, a file": ("explore photos/0.png encoder", "got 'photos/0.png', which is a file; name its folder."),
    "explore, no model": ("explore photos", "`MODEL`: expected a model to embed photos with, got none"),
    "explore, near model": ("explore photos photos/none", "'photos/none', which does not exist."),
    "explore, near name of ours": ("explore photos nucleii", "did you mean 'nuclei', which comes with the package?"),
    "knn, near name of ours": (f"{KNN} cifar_cpu {LABELLED}", "did you mean 'cifar10_cpu', which comes with"),
    "embed, unfinished": ("embed photos young out", "got 'young', a run that has not come to its end"),
    "embed, images twice": ("embed photos photos out", "got 'photos': it holds no config.json"),
    "knn, near model": (f"{KNN} labelled/trian {LABELLED}", "which does not exist; did you mean 'labelled/train'?"),
    "knn, no model": (f"{KNN} nowhere {LABELLED}", "`MODEL`: expected the folder or Hub id of a vision model"),
    "knn, bad weights": (f"{KNN} broken {LABELLED}", "`MODEL`: expected the folder or Hub id of a vision model"),
    "knn, no data": (f"{KNN} encoder", "`dataset_name`: expected labelled images, got none"),
    "knn, no such data": (f"{KNN} encoder --dataset_name a/b/c", "`dataset_name`: expected a Hub id or an existing"),
    "knn, k": (f"{KNN} encoder {LABELLED} --neighbours 0", "`neighbours`: expected numbers of at least 1"),
    "knn, results": (f"{KNN} taken {LABELLED}", "`output_dir`: expected JSON in taken/results.json"),
    "knn, in a file": (f"{KNN} encoder {LABELLED} --output_dir note.txt/out", "`output_dir`: expected a folder to"),
    "linear, share": (f"evaluate linear encoder {LABELLED} --held_out_ratio 2", "`held_out_ratio`: expected a share"),
    "retrieval, flag": (f"evaluate retrieval encoder {LABELLED} --seed -1", "`seed`: expected an integer from 0 to"),
    "linear, seed": (f"evaluate linear encoder {LABELLED} --seed 4294967296", "`seed`: expected an integer from 0 to"),
    "detection, seed": (
        f"finetune detection encoder {LABELLED} --seed 4294967296 --output_dir new",
        "`seed`: expected an integer from 0 to",
    ),
    "few-labels, labels": (f"evaluate few-labels encoder {LABELLED} --labels x", "`labels`: expected percentages"),
    "classifier, no folder": (f"finetune classification encoder {LABELLED}", "`output_dir`: expected a folder for"),
    "classifier, long": (
        f"finetune classification encoder {LABELLED} --output_dir {LONG}",
        "`output_dir`: expected a path that can be used",
    ),
    "classifier, weights": (
        f"finetune classification broken {LABELLED} --output_dir out",
        "`MODEL`: expected the folder or Hub id of a vision model",
    ),
    "detector, column": (f"{DETECTION} --output_dir out", "`objects_column_name`: expected a column 'objects'"),
    "detector, no folder": (DETECTION, "`output_dir`: expected a folder for the model"),
    "captioner, column": (
        f"finetune captioning encoder {LABELLED} --output_dir out",
        "`text_column_name`: expected a column 'text'",
    ),
    "detect, no image": ("detect encoder nothing.jpg", "`IMAGE`: expected image files, cannot read nothing.jpg"),
    "detect, no detector": ("detect encoder photos/0.png", "`MODEL`: expected the folder or Hub id of a detector"),
    "detect, threshold": ("detect encoder photos/0.png --threshold 2", "`threshold`: expected a number from 0 to 1"),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Folders of models, sound and damaged, and of images."""
    folder = tmp_path_factory.mktemp("mistakes")
    torch.manual_seed(0)
    encoder = BigBirdViTModel(BigBirdViTConfig(**SHAPE, image_size=16, patch_size=8, tile_size=1))
    for name in ("encoder", "log", "broken_run", "field"):
        encoder.save_pretrained(folder / name)
        BigBirdViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / name)
    (folder / "log" / "log.jsonl").write_bytes(b"\xff\xfe")
    ViTModel(ViTConfig(**SHAPE, image_size=16, patch_size=8)).save_pretrained(folder / "vit")
    for name in ("bare", "broken", "damaged", "empty", "young", "taken", "corrupt", "photos"):
        (folder / name).mkdir()
    (folder / "field" / "config.json").write_text('{"model_type": "bigbird_vit", "window_size": 2}')
    for name in ("bare", "broken"):
        (folder / name / "config.json").write_bytes((folder / "vit" / "config.json").read_bytes())
    (folder / "broken" / "model.safetensors").write_bytes(b"not what it should be")
    (folder / "damaged" / "config.json").write_text("{")
    (folder / "young" / "recipe.yaml").write_text("seed: 0")
    (folder / "young" / "log.jsonl").write_text("")
    (folder / "taken" / "results.json").mkdir()
    (folder / "corrupt" / "a.png").write_bytes(b"none")
    (folder / "note.txt").write_text("a file")
    for index in range(2):
        Image.new("RGB", (20, 20), (9, 90 * index, 9)).save(folder / "photos" / f"{index}.png")
        for split in ("train", "test"):
            where = folder / "labelled" / split / f"class {index}"
            where.mkdir(parents=True)
            Image.new("RGB", (20, 20), (9, 90 * index, 9)).save(where / "0.png")
    return folder


@pytest.fixture
def _at_work(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


@pytest.mark.usefixtures("_at_work")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_user_gets_one_line(mistake, workplace, capsys):
    command, message = MISTAKES[mistake]
    before = {path for path in workplace.rglob("*") if path.is_file()}
    assert main(command.split()) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("error: ")] == said[-1:]
    assert message in said[-1]
    assert not any("Traceback" in line for line in said)
    assert {path for path in workplace.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("_at_work")
@pytest.mark.parametrize("kind", [ValueError, OSError, KeyError])
@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("inspect cost encoder", "hf_vicreg.attention_cost.attention_cost"),
        ("inspect pattern encoder", "hf_vicreg.modeling.modeling_bigbird_vit.layer_pattern"),
        ("convert vit out", "hf_vicreg.convert.feature_drift"),
        ("publish encoder --repo me/it --dry_run", "hf_vicreg.publishing.staging.model_card"),
        ("doctor young", "hf_vicreg.training.monitor.doctor.read_run"),
        ("prepare photos prepared", "hf_vicreg.training.prepare.store._write_split"),
        (f"{KNN} encoder {LABELLED}", "hf_vicreg.training.evaluation.evaluate.describe_data"),
        (
            f"finetune classification encoder {LABELLED} --output_dir tuned",
            "hf_vicreg.training.tasks.training.TrainingLoop",
        ),
        ("detect encoder photos/0.png", "hf_vicreg.training.tasks.detection.detect.load_config"),
    ],
    ids=lambda value: value.split()[0] if " " in value else "",
)
def test_a_fault_of_ours_is_no_bad_input(kind, command, place, monkeypatch):
    def fault(*arguments, **options):
        raise kind("a fault of ours")

    monkeypatch.setattr(place, fault)
    with pytest.raises(kind, match="a fault of ours") as caught:
        main([*command.split(), *(["--output_dir", "faults"] if command.startswith("evaluate") else [])])
    assert not isinstance(caught.value, InputError)


def test_a_fault_keeps_its_traceback_in_a_process(run_process):
    code = (
        "import sys, hf_vicreg.training.monitor.doctor as doctor\n"
        "def broken(folder): raise ValueError('a fault of ours')\n"
        "doctor.read_run = broken\n"
        "from hf_vicreg.cli import main\n"
        "sys.exit(main(['doctor', 'anywhere']))"
    )
    finished = run_process([sys.executable, "-c", code])
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr
    assert "in broken" in finished.stderr
    assert finished.stderr.endswith("ValueError: a fault of ours\n")


def test_an_error_of_the_disk_is_told_by_its_number_alone(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "a"))
    with (
        pytest.raises(InputError, match=r"`out`: expected a path that can be used, got .*a': No space left"),
        place_for("out", tmp_path),
    ):
        raise full
    with pytest.raises(FileNotFoundError), place_for("out", tmp_path):
        (tmp_path / "missing").read_text()
    with pytest.raises(ValueError, match="ours") as caught, place_for("out", tmp_path):
        raise ValueError("ours")
    assert not isinstance(caught.value, InputError)


def test_blame_keeps_a_line_that_names_its_field_and_passes_faults():
    with pytest.raises(InputError, match=r"^`tile`: expected 1$"), blamed_on("MODEL"):
        raise ValueError("`tile`: expected 1")
    with (
        pytest.raises(InputError, match=r"^`MODEL`: expected a folder: a b$"),
        blamed_on("MODEL", "expected a folder"),
    ):
        raise OSError("a\n b")
    with pytest.raises(KeyError), blamed_on("MODEL"):
        json.loads("{}")["key"]
