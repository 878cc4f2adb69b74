"""`hf-vicreg` in real processes: what it prints, and one line with exit code 2 for bad input."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import ViTConfig

from hf_vicreg import BigBirdViTConfig, VicRegConfig, __version__
from hf_vicreg.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Configurations of an encoder, of a wrapper around one and of a model of another kind."""
    folder = tmp_path_factory.mktemp("models")
    encoder = BigBirdViTConfig(num_hidden_layers=2, image_size=512, tile_size=4)
    encoder.save_pretrained(folder / "encoder")
    VicRegConfig(encoder=encoder).save_pretrained(folder / "wrapper")
    ViTConfig().save_pretrained(folder / "vit")
    (folder / "invalid").mkdir()
    (folder / "invalid" / "config.json").write_text('{"model_type": "bigbird_vit", "window_size": 2}')
    return folder


def test_the_command_is_installed():
    command = [str(Path(sys.executable).parent / "hf-vicreg"), "--version"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (finished.returncode, finished.stdout.strip(), finished.stderr) == (0, __version__, "")


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "hf_vicreg", "finetune", "segmentaton"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    (line,) = finished.stderr.splitlines()
    assert (finished.returncode, line.endswith("did you mean `segmentation`?")) == (2, True)


@pytest.mark.parametrize(
    ("words", "end"),
    [
        ("pretain images", "`hf-vicreg` knows, got 'pretain'; did you mean `pretrain`?"),
        ("evaluate knnn", "`hf-vicreg evaluate` knows, got 'knnn'; did you mean `knn`?"),
        ("inspect veiws", "`hf-vicreg inspect` knows, got 'veiws'; did you mean `views`?"),
        ("inspect zzz", "got 'zzz'; one of cost, pattern, images, views."),
    ],
    ids=["verb", "evaluate", "inspect", "none-near"],
)
def test_a_misspelt_word_is_told_which_was_meant(words, end, capsys):
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(end)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "`VERB`: expected one of pretrain, inspect, "),
        (["evaluate", "knn"], "`MODEL`: expected a value, got none. See `hf-vicreg evaluate knn --help`."),
        (["publish", "x", "--re", "a"], "ambiguous option: --re could match --repo, --revision. See `hf-vicreg publi"),
        (["publish"], "`RUN`, `--repo`: expected a value, got none. "),
        (["compare", "x", "--seeds", "a"], "`--seeds`: expected a whole number, got 'a'. See `hf-vicreg compare --"),
        (["convert", "a", "b", "--attention_type", "x"], "`--attention_type`: expected one of "),
        (["inspect", "cost", "m", "--measure=3"], "`--measure`: expected no value, got '3'. "),
        (["evaluate", "knn", "m", "--seed"], "`--seed`: expected a value, got none. "),
        (["evaluate", "knn", "m", "n"], "`n`: expected a flag, got a word too many. "),
        (["evaluate", "knn", "m", "--neighbour=3"], "`--neighbour`: unknown flag; did you mean `--neighbours`? "),
        (["finetune", "detection", "m", "--x"], "`--x`: unknown flag. See `hf-vicreg finetune detection --help`."),
        (["pretrain", "x", "--batch_size", "b"], "`--batch_size`: expected a whole number, got 'b'. "),
        (
            ["pretrain", "x", "--modle.depths", "[3]"],
            "`--modle.depths`: unknown flag; did you mean `--model.depths`?",
        ),
    ],
)
def test_flags_that_cannot_be_read_get_one_line(words, said, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_costs_are_printed(folder, capsys):
    assert main(["inspect", "cost", str(folder / "encoder")]) == 0
    printed = capsys.readouterr().out
    assert "512x512 pixels: 32x32 patches, 1,025 tokens" in printed
    assert "density 0.151" in printed


def test_pretrain_is_the_trainer(tmp_path, capsys, caplog, tiny_recipe):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    flags = [
        "pretrain",
        "--config",
        str(tmp_path / "tiny.yaml"),
        "--dataset_name",
        "digits",
        "--max_train_samples",
        "64",
    ]
    assert main([*flags, "--output_dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert main([*flags, "--output_dir", str(tmp_path / "run")]) == 2
    assert "error: `output_dir`: expected a new or empty folder" in capsys.readouterr().err
    for arguments, words in ((["--help"], "pretrain an encoder"), (["pretrain", "--help"], "--batch_size")):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert words in capsys.readouterr().out


def test_cost_of_a_wrapper_is_its_encoders(folder, capsys):
    assert main(["inspect", "cost", str(folder / "encoder"), "--height", "256", "--width", "320"]) == 0
    expected = capsys.readouterr().out
    assert "256x320 pixels: 16x20 patches" in expected
    assert main(["inspect", "cost", str(folder / "wrapper"), "--height", "256", "--width", "320"]) == 0
    assert capsys.readouterr().out == expected


def test_forms_of_attention_are_timed_where_asked(folder, capsys):
    words = ["inspect", "cost", str(folder / "encoder"), "--height", "64", "--width", "80"]
    assert main([*words, "--measure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (begin,) = (index for index, line in enumerate(lines) if line.startswith("attention core, one image"))
    assert {line.split()[0] for line in lines[begin + 1 :]} == {"dense", "gathered", "blocks"}
    seconds = [float(line.split()[1]) for line in lines[begin + 1 :]]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_pattern_is_printed_and_drawn(folder, tmp_path, capsys):
    output = tmp_path / "pattern.svg"
    assert main(["inspect", "pattern", str(folder / "encoder"), "--layer", "1", "--output", str(output)]) == 0
    assert "8x8 tiles" in capsys.readouterr().out
    assert output.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost", "nowhere/at all"], "`MODEL`: expected the folder or Hub id of a vision model, got"),
        (["cost", "invalid"], "`window_size`: expected an odd number of tiles, at least 1, got 2"),
        (["pattern", "encoder", "--height", "16000", "--width", "16000"], "expected at most 4096 tiles, got 62500"),
        (["cost", "vit"], "`MODEL`: expected a model of type 'bigbird_vit', got 'vit'"),
        (["cost", "encoder", "--height", "0"], "expected an image of at least one patch (16, 16)"),
        (["cost", "encoder", "--height", "16000", "--width", "16000"], "expected at most 4096 tiles, got 62500"),
        (["pattern", "encoder", "--layer", "2"], "`--layer`: expected 0 to 1, got 2"),
        (["pattern", "encoder", "--output", "no/such/folder/a.svg"], "No such file or directory"),
    ],
    ids=["missing", "invalid", "pattern-tiles", "other-type", "height", "tiles", "layer", "output"],
)
def test_bad_input_gets_one_line(folder, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["inspect", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_ctrl_c_before_anything_has_begun_is_one_line():
    """Most of the first seconds go into importing torch."""
    program = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from hf_vicreg.cli import main
sys.exit(main(["inspect", "pattern", "digits"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
