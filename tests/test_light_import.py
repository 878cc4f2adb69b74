"""The package registers its models whichever of it and transformers comes first, and is light until it is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub")
USE = """
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoImageProcessor, AutoBackbone
config = AutoConfig.for_model("bigbird_vit", num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
model = AutoModel.from_config(config)
assert type(model).__module__ == "hf_vicreg.modeling.modeling_bigbird_vit"
assert AutoConfig.for_model("vicreg").model_type == "vicreg"
assert not [one for one in sys.meta_path if type(one).__module__ == "hf_vicreg._registration"]
import importlib.machinery, transformers
assert isinstance(transformers.__spec__.loader, importlib.machinery.SourceFileLoader)
"""
ORDERS = {
    "package-first": "import hf_vicreg\nassert 'torch' not in sys.modules",
    "transformers-first": "import transformers\nimport hf_vicreg",
    "auto-class-first": "from transformers import AutoModel\nimport hf_vicreg",
    "looked-for-first": "import hf_vicreg, importlib.util\nassert importlib.util.find_spec('transformers')",
    "name-first": "from hf_vicreg import VicRegForPreTraining",
    "configuration-first": "import hf_vicreg.modeling.configuration_vicreg",
    "model-first": "import hf_vicreg.modeling.modeling_vicreg",
    "processor-first": "import hf_vicreg.modeling.image_processing_bigbird_vit",
    "reloaded": "import importlib, hf_vicreg as one\nimportlib.reload(one).VicRegConfig\nimportlib.reload(one)",
    "training-first": "import hf_vicreg.training.pretrain",
}


def run(code, *arguments, cwd=REPOSITORY):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd, env=environment)
    assert finished.returncode == 0, finished.stderr
    return finished


QUICK = ("package-first",)  # the others are in the slow run


@pytest.mark.parametrize(
    "order", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in ORDERS]
)
def test_models_are_registered_in_any_order_of_imports(order):
    assert run(f"import sys\n{ORDERS[order]}\n{USE}").stderr == ""


@pytest.mark.slow
def test_a_model_reaches_a_spawned_process(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing\n"
        "def width(model):\n"
        "    from transformers import AutoConfig\n"
        "    return AutoConfig.for_model('bigbird_vit', hidden_size=model.config.hidden_size).hidden_size\n"
        "if __name__ == '__main__':\n"
        "    import hf_vicreg\n"
        "    config = hf_vicreg.BigBirdViTConfig(num_hidden_layers=1, hidden_size=24, num_attention_heads=2)\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(width, (hf_vicreg.BigBirdViTModel(config),)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(program)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert finished.stdout == "24\n", finished.stderr


@pytest.mark.slow
def test_transformers_imports_even_if_our_models_do_not():
    code = (
        "import sys, hf_vicreg\n"
        "sys.modules['hf_vicreg.modeling.modeling_vicreg'] = None  # as if it could not be imported\n"
        "import transformers\n"
        "from transformers import AutoConfig\n"
        "try:\n"
        "    hf_vicreg.BigBirdViTModel\n"
        "except ImportError:\n"
        "    print('told')\n"
    )
    finished = run(code)
    assert finished.stdout == "told\n"
    assert "hf_vicreg could not register its models: " in finished.stderr


LIGHT = {
    "version": (["--version"], 0, "0."),
    "help": (["--help"], 0, "pretrain an encoder"),
    "help of pretrain": (["pretrain", "--help"], 0, "usage: hf-vicreg pretrain"),
    "help of evaluate": (["evaluate", "knn", "--help"], 0, "--neighbours"),
    "help of views": (["inspect", "views", "--help"], 0, "--model.num_channels"),
    "verb": (["pretrin"], 2, "pretrin"),
    "flag": (["pretrain", "digits", "--lerning_rate", "1"], 2, "did you mean `--learning_rate`?"),
    "folder": (["pretrain", "photoss"], 2, "'photoss', which does not exist; did you mean 'photos'?"),
    "folder in a folder": (["pretrain", "photos/holiday"], 2, "`dataset_name`: expected a Hub id or an existing"),
    "train_dir": (["pretrain", "--train_dir", "photoss"], 2, "did you mean 'photos'?"),
    "recipe": (["pretrain", "digits", "--config", "none"], 2, "`config`: expected a YAML file or one of"),
    "output_dir": (["pretrain", "digits", "--output_dir", "photos"], 2, "`output_dir`: expected a new or empty"),
    "range": (["pretrain", "digits", "--batch_size", "1"], 2, "`batch_size`: expected at least 2"),
    "time": (["pretrain", "digits", "--time_budget", "soon"], 2, "`time_budget`: expected a time like"),
    "memory": (["pretrain", "digits", "--max_memory", "much"], 2, "`max_memory`: expected memory like"),
    "device": (["pretrain", "digits", "--device", "tpu"], 2, "`device`: expected 'auto', 'cpu'"),
    "views": (["pretrain", "digits", "--views.hue", "2"], 2, "`views.hue`: expected a number from 0 to 0.5"),
    "model key": (["pretrain", "digits", "--model.hiden_size", "8"], 2, "did you mean `hidden_size`?"),
    "second model key": (
        ["pretrain", "digits", "--second_model.patchsize", "8"],
        2,
        "`second_model.patchsize`: unknown",
    ),
    "loss key": (["pretrain", "digits", "--vicreg.gama=1"], 2, "`vicreg.gama`: unknown key; did you mean `gamma`?"),
    "begun flag": (
        ["pretrain", "digits", "--learn", "1"],
        2,
        "`--learning_rate`? See `hf-vicreg pretrain --help`.",
    ),
    "masked teacher": (
        ["pretrain", "digits", "--objective", "mae", "--teacher", "x"],
        2,
        "`teacher`: expected none with objective 'mae'",
    ),
    "section": (["pretrain", "digits", "--simcl.temperature", "1"], 2, "did you mean `--simclr.temperature`?"),
    "pages": (["pretrain", "digits", "--pages", "odd"], 2, "`pages`: expected 'channels' or 'images', got 'odd'"),
    "bounds": (["pretrain", "digits", "--normalisation", "fixed", "5", "2"], 2, "`normalisation`: expected fixed LOW"),
    "run for images": (["pretrain", "runs/old"], 2, "the folder of a run; name its images"),
    "processes": (["pretrain", "digits", "--num_processes", "0"], 2, "`num_processes`: expected 1 to 64, got 0"),
    "several": (["pretrain", "photoss", "--num_processes", "2"], 2, "did you mean 'photos'?"),
    "resuming": (["pretrain", "digits", "--resume_from_checkpoint", "latest"], 2, "the newest are runs/old."),
}


@pytest.mark.parametrize("case", LIGHT)
def test_what_needs_no_model_loads_no_library(case, tmp_path):
    arguments, code, words = LIGHT[case]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "note.txt").touch()
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "recipe.yaml").touch()
    (tmp_path / "runs" / "old" / "log.jsonl").touch()
    program = (
        "import sys\n"
        "from hf_vicreg.cli import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as left:\n"
        "    code = left.code or 0\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "print('code', code, 'loaded', loaded)\n"
    )
    finished = run(program, *arguments, cwd=tmp_path)
    assert finished.stdout.splitlines()[-1] == f"code {code} loaded []"
    told = finished.stderr if code else finished.stdout
    assert words in told
    assert code == 0 or case == "verb" or len(told.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "runs"}  # nothing is written


@pytest.mark.parametrize("columns", [60, 160])
def test_help_lists_every_flag_in_its_group_and_fits_the_screen(columns):
    program = (
        "import os, sys\nos.environ['COLUMNS'] = sys.argv.pop(1)\nfrom hf_vicreg.cli import main\nmain(sys.argv[1:])"
    )
    text = run(program, str(columns), "pretrain", "--help").stdout
    groups = ("data", "model", "loss", "views", "optimisation", "run", "evaluation", "Hub")
    places = [text.index(f"\n{group}:\n") for group in groups]
    assert places == sorted(places)
    parts = {group: text[at:end] for group, at, end in zip(groups, places, [*places[1:], None], strict=True)}
    for group, flag in (("views", "--views.hue"), ("model", "--model.tile_size"), ("loss", "--vicreg.gamma")):
        assert f"\n  {flag} " in parts[group]
    words = " ".join(text.split())
    assert "in turns. (default: 0.1)" in words
    assert "expander's layers. (default: [8192,8192,8192])" in words
    assert max(map(len, text.splitlines())) <= columns
    # a column for the words that is no narrow strip
    assert max(len(line) - len(line.lstrip()) for line in text.splitlines()) <= columns // 3
