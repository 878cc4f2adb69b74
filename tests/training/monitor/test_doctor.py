"""`hf-vicreg doctor RUN`: what it says of a log, its exit codes, and the table in the guide."""

import json
import re
from pathlib import Path

import pytest

from hf_vicreg import pretrain
from hf_vicreg.cli import main
from hf_vicreg.training.engine.step import short
from hf_vicreg.training.monitor.doctor import FIGURES, health_table, report
from hf_vicreg.training.monitor.summary import summary
from hf_vicreg.training.objectives.registry import ENTRIES, entry_of

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "guides" / "health.md"

LINE = {
    "loss": 20.0,
    "embedding_std_mean": 0.3,
    "embedding_rank": 30.0,
    "learning_rate": 1e-3,
    "images_per_second": 9e4,
}


@pytest.fixture
def run_folder(tmp_path):
    """Returns a function that writes a run's recipe and log; the lines' figures, or the log's text."""

    def write(figures, recipe="vicreg: {}\n", text=None):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(recipe)
        lines = [json.dumps(LINE | {"step": 10 * (at + 1)} | one) + "\n" for at, one in enumerate(figures)]
        (folder / "log.jsonl").write_text("".join(lines) if text is None else text)
        return str(folder)

    return write


def test_a_healthy_run_is_said_to_be_one(run_folder, capsys):
    assert main(["doctor", run_folder([{}] * 12)]) == 0
    printed = capsys.readouterr().out
    assert "Healthy: nothing wrong at step 120." in printed
    assert re.search(r"embedding_rank +30 +30 +30  well above 2", printed)
    assert re.search(r"images_per_second +90,000", printed)


def test_a_collapsed_run_is_named_with_its_remedy(run_folder, capsys):
    assert main(["doctor", run_folder([{"embedding_std_mean": 0.3}] * 6 + [{"embedding_std_mean": 0.01}] * 6)]) == 1
    printed = capsys.readouterr().out
    assert "embedding collapse: the embeddings' mean standard deviation is 0.01" in printed
    assert "raise vicreg.variance_weight" in printed
    assert "(since step 90)" in printed
    assert "1 thing(s) wrong." in printed


def test_what_has_passed_is_mentioned_and_no_reason_for_alarm(run_folder, capsys):
    ill, well = [{"embedding_std_mean": 0.01}] * 12, [{"embedding_std_mean": 0.5}] * 12
    assert main(["doctor", run_folder(ill + well)]) == 0
    printed = capsys.readouterr().out
    assert "Passed: embedding collapse" in printed
    assert "Healthy" in printed


def test_gamma_of_the_recipe_is_the_target(run_folder):
    assert main(["doctor", run_folder([{}] * 12, recipe="vicreg: {gamma: 4.0}\n")]) == 1


def test_a_young_or_cut_log_is_read_as_far_as_it_goes(run_folder, capsys):
    text = json.dumps(LINE | {"step": 10}) + '\n{"step": 20, "lo'
    assert main(["doctor", run_folder([], text=text)]) == 0
    assert "The log has 1 line(s) so far; trends need 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"missing": "recipe.yaml"}, "has no recipe.yaml; name its output_dir"),
        ({"missing": "log.jsonl"}, "has no log.jsonl"),
        ({"log.jsonl": b""}, "expected lines of training steps"),
        ({"log.jsonl": b"[1]\n3\nnothing\n"}, "expected lines of training steps"),
        ({"log.jsonl": b"\xff\xfe\x00"}, "it is not text"),
        ({"recipe.yaml": b"vicreg: ["}, "expected the recipe of a run"),
        ({"recipe.yaml": b"- 1"}, "expected the recipe of a run"),
        ({"recipe.yaml": b"vicreg: {gamma: high}"}, "expected the recipe of a run"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(change, message, run_folder, capsys):
    folder = Path(run_folder([{}] * 12))
    for name, contents in change.items():
        if name == "missing":
            (folder / contents).unlink()
        else:
            (folder / name).write_bytes(contents)
    assert main(["doctor", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: `RUN`: expected ")
    assert message in line


def test_the_guide_documents_every_field_that_a_run_writes(tmp_path, tiny_recipe, capsys):
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    settings = tiny_recipe | {"second_model": resnet, "knn_every_epochs": 1, "linear_probe": True}
    settings |= {"num_train_epochs": 2, "knn_train_samples": 32, "knn_test_samples": 16}
    pretrain(out=tmp_path / "run", data="digits", max_train_samples=64, **settings)
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    written = {key.removeprefix("second_") for line in lines for key in line}
    documented = set(re.findall(r"^\| `(\w+)`", GUIDE.read_text().split("## Fields of log.jsonl")[1], re.MULTILINE))
    assert written | {"flops_per_second", "mfu"} == documented  # those two are of runs of ten seconds and more
    assert all(isinstance(value, int | float) for line in lines for value in line.values())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["health"]) == set(FIGURES)  # with a second encoder all of them are there
    assert health_table(lines) in printed  # the summary at the end
    assert "Nothing wrong so far at step 4, but the log is too short" in report(lines, 1.0)[0]
    took = results | {"training_seconds": 61.0}
    assert "Longer than the 1m given" in summary(tmp_path, took, lines, time_budget="1m")
    assert "Longer" not in summary(tmp_path, took, lines, seconds=119.0, time_budget="2m")
    assert "Longer than the 2m given: 121 s in all." in summary(tmp_path, took, lines, seconds=121.0, time_budget="2m")
    assert main(["doctor", str(tmp_path / "run")]) == 0
    assert "second_encoder_spread" in capsys.readouterr().out


def test_what_is_normal_is_that_of_the_objective():
    line = {"step": 1, "loss": 2.0} | dict.fromkeys(FIGURES, 1.0)
    assert "towards gamma" in health_table([line])
    normalised = health_table([line], ENTRIES["simclr"])
    assert "towards 1; a collapse" in normalised
    assert "gamma" not in normalised
    masked = health_table([line], ENTRIES["mae"])
    assert "embedding" not in masked
    assert "encoder_rank" in masked


@pytest.mark.parametrize("objective", [*ENTRIES, "mae+vicreg", "vicregl+byol"])
def test_parts_of_a_loss_can_be_told_apart_in_the_line_of_progress(objective):
    parts = entry_of({"objective": objective}).parts
    assert len({short(part) for part in parts}) == len(parts)
