"""Trackers in real processes, the curves, and the log that a resumed run continues."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.monitor.curves import draw_curves, with_ends
from hf_vicreg.training.monitor.tracking import tracker_names
from hf_vicreg.training.run.resolve import resolve

REPOSITORY = Path(__file__).resolve().parents[3]
MODULE = "hf_vicreg.training.pretrain"


@pytest.fixture
def command(tmp_path, tiny_recipe, image_folder):
    """Returns a function that gives the command line of a tiny run with trackers."""
    folder, recipe = image_folder(64), tmp_path / "tiny.yaml"

    def build(report_to, *flags, **changes):
        recipe.write_text(yaml.safe_dump(tiny_recipe | changes))
        flags = ["--with_tracking", "--report_to", report_to, *flags]
        return [sys.executable, "-m", MODULE, "--config", recipe, "--train_dir", folder, "--output_dir", "run", *flags]

    return build


def test_tensorboard_gets_what_the_log_has(command, tmp_path, run_process, ranks):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    _, *program = command("tensorboard", num_train_epochs=2)
    program[program.index("run")] = tmp_path / "run"
    finished = ranks(1, *program)
    assert finished.returncode == 0, finished.stderr
    script = (
        "import json, sys\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "events = EventAccumulator('run/trackers/hf_vicreg').Reload()\n"
        "tags = events.Tags()['scalars']\n"
        "print(json.dumps({tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in tags}))\n"
    )
    read = run_process([sys.executable, "-W", "ignore", "-c", script], timeout_s=100)
    assert read.returncode == 0, read.stderr
    scalars = json.loads(read.stdout)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert scalars.keys() == lines[0].keys() - {"step"}
    for key, points in scalars.items():
        assert [step for step, _ in points] == [line["step"] for line in lines]
        assert [value for _, value in points] == pytest.approx([line[key] for line in lines], rel=1e-5)


def test_wandb_writes_offline(command, tmp_path, run_process):
    pytest.importorskip("wandb", reason="wandb is not installed")
    finished = run_process(command("wandb"), timeout_s=200, WANDB_MODE="offline", WANDB_SILENT="true")
    assert finished.returncode == 0, finished.stderr
    assert list((tmp_path / "run" / "trackers" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_a_tracker_that_is_not_installed_is_one_line_and_nothing_is_written(command, tmp_path, run_process):
    # a finder that finds neither, as on a machine without them
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "hidden = ('wandb', 'tensorboard')\n"
        "importlib.util.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)\n"
    )
    paths = os.pathsep.join([str(tmp_path / "hidden"), str(REPOSITORY)])
    for report_to, remedy in (("wandb", "pip install wandb"), ("all", "pip install tensorboard")):
        finished = run_process(command(report_to), timeout_s=100, PYTHONPATH=paths)
        assert finished.returncode == 2, finished.stderr
        (line,) = finished.stderr.strip().splitlines()
        assert line.startswith("error: `report_to`: expected an installed tracker")
        assert line.endswith(f"{remedy}.")
    assert not (tmp_path / "run").exists()


def test_unknown_trackers_and_flags_that_are_not_flags_are_named():
    with pytest.raises(InputError, match="`report_to`: expected one of tensorboard, wandb or all, got 'mlflow'"):
        tracker_names("mlflow")
    needed = {"output_dir": "somewhere", "dataset_name": "digits"}
    assert resolve(needed | {"with_tracking": True}).run.with_tracking is True
    for value in ("yes", 1, None):
        with pytest.raises(InputError, match="`linear_probe`: expected bool"):
            resolve(needed | {"linear_probe": value} if value is not None else needed | {"linear_probe": "None"})


@pytest.mark.pictures
def test_curves_are_drawn_from_what_there_is(tmp_path, monkeypatch, caplog):
    bare = [{"step": at, "loss": 9.0, "invariance": 0.0, "variance": 0.5, "covariance": float("nan")} for at in (1, 2)]
    full = [one | {"embedding_std_mean": 0.3, "embedding_rank": 3, "encoder_rank": 2} for one in bare]
    measured = [*full, {"step": 2, "epoch": 1, "knn_accuracy": 0.3, "linear_accuracy": 0.4}]
    for name, records in (("none", []), ("bare", bare), ("full", full), ("measured", measured)):
        assert draw_curves(records, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with caplog.at_level("INFO", logger="hf_vicreg"):
        assert not draw_curves(full, tmp_path / "absent.png")
    assert "matplotlib is not installed" in caplog.text
    assert not (tmp_path / "absent.png").exists()


def test_curves_begin_with_the_untrained_encoder_and_end_with_the_trained_one():
    records = [{"step": 3, "loss": 1.0}, {"step": 3, "epoch": 1, "knn_accuracy": 0.4}]
    measured = {"raw_pixels": 0.2, "untrained": 0.3, "trained": 0.5, "second_trained": 0.1}
    found = with_ends(records, {"steps": 6, "knn_accuracy": measured, "linear_accuracy": {}})
    assert found == [
        {"step": 0, "knn_accuracy": 0.3},
        *records,
        {"step": 6, "knn_accuracy": 0.5, "second_knn_accuracy": 0.1},
    ]
    assert with_ends(records, {}) == records
