"""`hf-vicreg compare`: real runs of two objectives, their table, what is refused, what a stopped one goes on from."""

import contextlib
import io
import json
import os
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest
import yaml

from hf_vicreg.cli import main
from hf_vicreg.comparison.command import asked_for
from hf_vicreg.comparison.planning import plan_comparison
from hf_vicreg.comparison.runs import compare
from hf_vicreg.comparison.table import summary_of, to_markdown
from hf_vicreg.training import command
from hf_vicreg.training.errors import InputError

OBJECTIVES = ["vicreg", "simclr"]
SMALL = {"device": "cpu", "max_train_samples": 64, "knn_train_samples": 32, "knn_test_samples": 16, "seed": 5}
COMPARE = [sys.executable, "-m", "hf_vicreg.cli", "compare", "digits", "--config", "recipe.yaml"]


def asked(folder, recipe, *, images="digits", objectives=OBJECTIVES, seeds=1):
    """Return what a comparison is made of, with a recipe in `folder`."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | SMALL | {"simclr": {"temperature": 0.3}}))
    return asked_for(
        str(images), objectives, time_budget="1m", seeds=seeds, config=str(path), folder=folder / "comparison"
    )


def short_plan(given, folder):
    """Plan, and then take three steps only."""
    plans = plan_comparison(given, str(folder))
    for plan in plans.values():
        assert plan["recipe"]["max_steps"] == plan["steps"] == int(60 / plan["step_seconds"])
        assert plan["peak_memory"] > 2**20
        plan["recipe"]["max_steps"] = 3
    return plans


def train_here(flags):
    """Train as the process of a run does, its last words left out."""
    with contextlib.redirect_stdout(io.StringIO()):
        return command.main(flags)


def nothing(*words):
    raise AssertionError(f"again: {words}")


@pytest.mark.parametrize("seeds", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_objectives_are_trained_alike_and_the_table_is_that_of_their_results(
    seeds, tmp_path, tiny_recipe, capsys, caplog
):
    caplog.set_level("INFO", "hf_vicreg")
    given, folder = asked(tmp_path, tiny_recipe, seeds=seeds), tmp_path / "comparison"
    assert "the recipe's `simclr.temperature` are left out for vicreg" in caplog.text
    numbers = given["seeds"]
    assert numbers == [5, 6][:seeds]
    assert compare(given, folder, plan=short_plan, train=train_here) == 0
    text = capsys.readouterr().out
    record = json.loads((folder / "comparison.json").read_text())
    vicreg, simclr = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in OBJECTIVES)
    for key in ("model", "views", "batch_size", "learning_rate", "linear_probe", "max_train_samples"):
        assert vicreg[key] == simclr[key]
    assert simclr["simclr"]["temperature"] == 0.3
    assert vicreg["linear_probe"]

    for name in OBJECTIVES:
        results = [json.loads((folder / f"{name}-seed{seed}" / "results.json").read_text()) for seed in numbers]
        assert [one["objective"] for one in results] == [name] * seeds
        assert all((folder / f"{name}-seed{seed}" / "log.jsonl").exists() for seed in numbers)
        rows = record["table"][name]
        expected = {
            "knn_accuracy": [one["knn_accuracy"]["trained"] for one in results],
            "linear_accuracy": [one["linear_accuracy"]["trained"] for one in results],
            "encoder_rank": [one["health"]["encoder_rank"] for one in results],
            "images_per_second": [one["steps"] * 32 / one["training_seconds"] for one in results],
            "steps": [one["steps"] for one in results],
            "training_seconds": [one["training_seconds"] for one in results],
        }
        for column, values in expected.items():
            mean = sum(values) / seeds
            squares = sum((one - mean) ** 2 for one in values)
            assert rows[column]["mean"] == pytest.approx(mean)
            assert rows[column]["std"] == (None if seeds == 1 else pytest.approx((squares / (seeds - 1)) ** 0.5))
            assert rows[column]["runs"] == seeds
        cells = [one.strip() for one in next(row for row in text.splitlines() if f"| {name} " in row).split("|")]
        first = rows["knn_accuracy"]
        spread = "" if seeds == 1 else f" ± {first['std']:.3f}"
        assert cells[2:4] == [f"{seeds} of {seeds}", f"{first['mean']:.3f}{spread}"]
    assert text.startswith((folder / "comparison.md").read_text())
    assert "20-NN" in text.splitlines()[0]
    assert (folder / "comparison.png").stat().st_size > 1000

    # again: nothing is trained
    assert compare(given, folder, plan=nothing, train=nothing) == 0
    assert capsys.readouterr().out == text
    # one run that fails does not end the others, and is tried again
    shutil.rmtree(folder / "simclr-seed5")
    (folder / "simclr-seed5").write_text("in the way")
    assert compare(given, folder, plan=nothing, train=train_here) == 1
    text = capsys.readouterr().out
    assert f"| {seeds - 1} of {seeds} |" in text
    assert "simclr-seed5 failed, exit code 2" in text
    # other settings
    other = given | {"seeds": [9]}
    with pytest.raises(InputError, match=r"`output_dir`: expected `seeds` \[9\] in .*, found \[5"):
        compare(other, folder, plan=nothing, train=nothing)
    given["settings"].pop("vicreg")
    with pytest.raises(InputError, match=r"`output_dir`: expected the comparison that is asked for in .*, found more"):
        compare(given, folder, plan=nothing, train=nothing)


def test_a_sum_of_objectives_is_compared_like_one(tmp_path, tiny_recipe):
    weights = {"objective_weights": {"mae": 2.0}}
    given = asked(tmp_path, tiny_recipe | weights, objectives=["vicreg", "mae+vicreg"])
    assert "objective_weights" not in given["settings"]["vicreg"]
    both = given["settings"]["mae+vicreg"]
    assert (both["objective"], both["objective_weights"]) == ("mae+vicreg", {"mae": 2.0})
    apart = asked(tmp_path, tiny_recipe, objectives=["vicreg", "mae+simmim"])
    with pytest.raises(InputError, match=r"`objective`: expected one method that masks images at most, got mae and"):
        plan_comparison(apart, str(tmp_path / "comparison"))


def test_mean_and_spread_over_seeds():
    values = [0.25, 0.5, 1.0]
    runs = [{"objective": "byol", "encoder_rank": one} for one in values] + [{"objective": "mae", "encoder_rank": 3}]
    table = summary_of(runs)
    assert table["byol"]["encoder_rank"] == {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values),
        "runs": 3,
    }
    assert table["mae"] == {"encoder_rank": {"mean": 3, "std": None, "runs": 1}}


def test_the_table_says_what_is_missing_wrong_or_unequal():
    run = {"objective": "mae", "folder": "mae-seed0", "encoder_rank": 3.0, "training_seconds": 75.0}
    run |= {"hardware": "a <b>| card\nof mine", "neighbours": 20, "wrong": ["collapse"]}
    record = {
        "asked": {"seconds": 60.0, "seeds": [0], "settings": {"mae": {}, "byol": {}}},
        "runs": [run],
        "table": summary_of([run]),
        "failed": {"byol-seed0": 137},
    }
    lines = to_markdown(record).splitlines()
    assert [len(line) for line in lines[:4]] == [len(lines[0])] * 4
    assert lines[3].split("|")[1:5] == [" byol      ", " 0 of 1 ", "              - ", "       - "]
    text = "\n".join(lines)
    for said in (
        "mae-seed0 trained 25% longer than asked for",
        "mae-seed0: collapse (",
        "byol-seed0 failed, exit code 137",
        "No labels, so no accuracies",
    ):
        assert said in text
    assert "card\nof" not in text


MISTAKES = {
    "unknown": (["--objectives", "vicreg,simclar"], "got 'simclar'; did you mean `simclr`?"),
    "one": (["--objectives", "vicreg"], "`objectives`: expected at least two different ones"),
    "twice": (["--objectives", "vicreg,vicreg"], "`objectives`: expected at least two different ones"),
    "time": (["--time_budget", "soon"], "`time_budget`: expected a time like 90s"),
    "seeds": (["--seeds", "0"], "`seeds`: expected at least 1, got 0"),
    "recipe": (["--config", "nowhere.yaml"], "`config`: expected a YAML file or one of"),
    "images": (["no/such/place"], "`data`: expected a folder of images"),
    "full": (["--output_dir", "full"], "`output_dir`: expected a new folder or one with comparison.json"),
    "file": (["--output_dir", "full/note"], "`output_dir`: expected a folder, got full/note, which is a file"),
    "foreign": (["--output_dir", "foreign"], "`output_dir`: expected a comparison in foreign/comparison.json"),
    "method": (["--config", "method.yaml"], "`second_model`: expected none with objective 'byol'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_bad_input_is_one_line_and_nothing_is_written(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in {"full/note": "", "foreign/comparison.json": "{}", "method.yaml": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "method.yaml").write_text("second_model: {hidden_size: 64}\n")
    before = sorted(tmp_path.rglob("*"))
    flags, said = MISTAKES[case]
    images = [] if case == "images" else ["digits"]
    given = {"--objectives": "vicreg,byol", "--time_budget": "1m", "--output_dir": "new"}
    given |= {} if case == "images" else dict(zip(flags[::2], flags[1::2], strict=True))
    words = [*(flags if case == "images" else images), *(word for pair in given.items() for word in pair)]
    assert main(["compare", *words]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert said in line
    assert sorted(tmp_path.rglob("*")) == before


def test_too_short_a_time_is_refused_before_anything_is_written(tmp_path, tiny_recipe, image_folder):
    given = asked(tmp_path, tiny_recipe, images=image_folder()) | {"seconds": 1e-3}
    with pytest.raises(
        InputError, match=r"`time_budget`: expected time for one pass .* for 'vicreg', got 1 s; raise it"
    ):
        compare(given, tmp_path / "comparison", plan=lambda *words: plan_comparison(words[0], str(words[1])))
    assert not (tmp_path / "comparison").exists()


def test_small_views_of_masked_images_can_be_compared(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    model = {"hidden_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    recipe.write_text(yaml.safe_dump(SMALL | {"views": {"image_size": 24}, "model": model}))
    folder = tmp_path / "comparison"
    given = asked_for("digits", ["mae", "simmim"], time_budget="2m", seeds=1, config=str(recipe), folder=folder)
    for planned in plan_comparison(given, str(folder)).values():
        assert planned["recipe"]["views"]["image_size"] == 24
        assert planned["chooses_used_size"] is False


@pytest.mark.slow
def test_an_open_encoder_is_planned_once_with_patches_that_suit_all(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SMALL))
    given = asked_for(
        "digits", ["vicreg", "mae"], time_budget="2m", seeds=1, config=str(recipe), folder=tmp_path / "comparison"
    )
    plans = plan_comparison(given, str(tmp_path / "comparison"))
    vicreg, mae = plans["vicreg"]["recipe"], plans["mae"]["recipe"]
    assert vicreg["model"] == mae["model"]
    assert mae["model"].get("patch_stride") in (None, mae["model"]["patch_size"])
    for key in ("batch_size", "learning_rate", "expander_lr_scale"):
        assert vicreg[key] == mae[key], key
    assert vicreg["learning_rate"] <= 1e-3  # more is for an expander at a rate of its own, which not all have
    assert vicreg["vicreg"]["invariance_weight"] == 10.0  # the plan of a short run; not of mae
    assert "invariance_weight" not in mae["vicreg"]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_comparison_that_is_killed_or_stopped_goes_on_from_its_checkpoint(tmp_path, tiny_recipe, run_process):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe | SMALL | {"checkpointing_steps": 5}))
    words = [*COMPARE, "--objectives", "vicreg,simclr", "--time_budget", "20s", "--seeds", "1"]
    words += ["--output_dir", str(tmp_path / "out")]  # whole: looked for among the words of processes
    first = tmp_path / "out" / "vicreg-seed5"
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = run_process.start(words)
        seen = set(first.glob("checkpoints/step_*"))
        _wait_for(lambda seen=seen: set(first.glob("checkpoints/step_*")) - seen, process)
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == (75 if number == signal.SIGTERM else -9), err
        assert "objective" not in out  # no table
        if number == signal.SIGKILL:  # the run notices that nobody waits for it, and leaves a checkpoint
            _wait_for(lambda: not _running(first))
    assert "resumed from step_" in err
    assert "the same command goes on" in err
    plans = json.loads((tmp_path / "out" / "comparison.json").read_text())["plans"]
    done = run_process(words)
    assert done.returncode == 0, done.stderr
    assert "resumed from step_" in done.stderr
    assert "trying a few steps" not in done.stderr
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["plans"] == plans
    assert [one["steps"] for one in record["runs"]] == [plans[name]["steps"] for name in OBJECTIVES]
    assert done.stdout.startswith("| objective")
    shutil.rmtree(tmp_path / "out" / "simclr-seed5")
    (tmp_path / "out" / "simclr-seed5").write_text("in the way")
    assert run_process(words).returncode == 1


def _running(folder):
    """Whether a process has the folder among its words."""
    for place in os.listdir("/proc"):
        try:
            if place.isdigit() and str(folder) in Path(f"/proc/{place}/cmdline").read_text():
                return True
        except OSError:
            continue
    return False


def _wait_for(condition, process=None, timeout_s=180):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
