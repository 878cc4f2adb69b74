"""`hf-vicreg tune`: real trials, their table and recipe, what is refused, what a stopped one goes on from."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from hf_vicreg.cli import main
from hf_vicreg.comparison.planning import plan_comparison
from hf_vicreg.training import command
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.tuning import judging, runs
from hf_vicreg.tuning.command import asked_for
from hf_vicreg.tuning.runs import space_of, tune, with_trial

SMALL = {"device": "cpu", "max_train_samples": 64, "knn_train_samples": 32, "knn_test_samples": 16, "seed": 5}
LABEL_FREE = "label_free.json"


def asked(folder, recipe, *, images="digits", **given):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | SMALL))
    given = {"time_budget": "10m", "objective": None, "trials": 3, "judge": "auto", "search": []} | given
    return asked_for(str(images), config=str(path), folder=folder / "tuning", **given)


def planned(given, folder):
    return plan_comparison(given, str(folder))


def written_out(given, folder):
    """A plan as it would be of a recipe that leaves nothing open, without trying its steps."""
    ((name, settings),) = given["settings"].items()
    recipe = resolve(settings | {"output_dir": "x", "linear_probe": False}).to_recipe()
    recipe = {key: one for key, one in recipe.items() if key not in ("output_dir", "seed")}
    return {name: {"recipe": recipe, "step_seconds": 10.0, "steps_per_epoch": 1, "labelled": False}}


def train_here(flags):
    """Train as the process of a trial does, for a few steps, its last words left out."""
    path = Path(flags[flags.index("--config") + 1])
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"max_steps": 2 + ("round2" in path.name)}))
    with contextlib.redirect_stdout(io.StringIO()):
        return command.main(flags)


def judge_here(recipe, run):
    assert recipe.name == "base.yaml"  # the same views for all trials
    assert judging.main([str(recipe), str(run)]) == 0
    return json.loads((run / LABEL_FREE).read_text())


def nothing(*words):
    raise AssertionError(f"again: {words}")


def test_the_better_half_is_trained_anew_and_the_best_ones_recipe_is_left(
    tmp_path, tiny_recipe, image_folder, capsys, monkeypatch
):
    monkeypatch.setattr(judging, "NUM_IMAGES", 16)
    given, folder = asked(tmp_path, tiny_recipe, images=image_folder()), tmp_path / "tuning"
    trained = []

    def stopping(flags):  # as one that is asked to stop, at the second trial
        trained.append(flags[flags.index("--output_dir") + 1].rpartition("/")[2])
        return 75 if len(trained) == 2 else train_here(flags)

    assert tune(given, folder, plan=written_out, train=stopping, judge=judge_here) == 75
    assert "learning_rate" not in capsys.readouterr().out  # no table
    assert not (folder / "tuned.yaml").exists()

    def failing(flags):  # one trial of the first round
        trained.append(flags[flags.index("--output_dir") + 1].rpartition("/")[2])
        return 1 if trained[-1] == "trial01-round1" else train_here(flags)

    assert tune(given, folder, plan=nothing, train=failing, judge=judge_here) == 0
    text = capsys.readouterr().out
    assert trained == [
        *("trial00-round1", "trial01-round1", "trial01-round1", "trial02-round1"),
        *(
            f"trial{number:02d}-round2"
            for number in json.loads((folder / "tuning.json").read_text())["rounds"][1]["members"]
        ),
    ]
    record = json.loads((folder / "tuning.json").read_text())
    first, second = record["rounds"]
    assert record["judge"] == "rankme"
    assert second["steps"] >= first["steps"]
    assert first["figures"]["1"] == {}
    assert second["members"] == sorted((0, 2), key=lambda number: -first["figures"][str(number)]["rankme"])
    assert record["failed"] == {"trial01-round1": 1}
    for one, level in ((first, 1), (second, 2)):
        for number, figures in one["figures"].items():
            if figures:
                run = folder / f"trial{int(number):02d}-round{level}"
                assert figures == json.loads((run / LABEL_FREE).read_text())
                recipe = yaml.safe_load((folder / f"{run.name}.yaml").read_text())
                values = record["trials"][int(number)]
                assert recipe["learning_rate"] == values["learning_rate"]
                assert recipe["vicreg"]["covariance_weight"] == values["vicreg.covariance_weight"]
    ranked = sorted(second["members"], key=lambda number: -second["figures"][str(number)]["rankme"])
    assert record["best"] == ranked[0]
    assert text.startswith((folder / "tuning.md").read_text())
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")][2:]
    assert rows == [*map(str, ranked), "1"]
    assert "failed" in text
    # the recipe is one: of the best trial, without the length of any
    recipe = yaml.safe_load((folder / "tuned.yaml").read_text())
    assert not recipe.keys() & {"max_steps", "num_train_epochs"}
    config = resolve({"config": str(folder / "tuned.yaml"), "output_dir": "x"})
    assert config.run.learning_rate == record["trials"][ranked[0]]["learning_rate"]
    assert config.views.crop_min_ratio == record["trials"][ranked[0]]["views.crop_min_ratio"]
    # again: nothing is trained
    assert tune(given, folder, plan=nothing, train=nothing, judge=nothing) == 0
    assert capsys.readouterr().out == text
    with pytest.raises(InputError, match=r"`output_dir`: expected `trials` 4 in .*, found 3"):
        tune(given | {"trials": 4}, folder, plan=nothing, train=nothing, judge=nothing)
    with pytest.raises(InputError, match=r"`judge`: expected one that needs no labels"):
        tune(given | {"judge": "knn"}, tmp_path / "other", plan=written_out, train=nothing)
    with pytest.raises(InputError, match=r"`time_budget`: expected time for one pass over the images in each of 3"):
        tune(given | {"seconds": 0.1}, tmp_path / "other", plan=written_out, train=nothing)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_where_there_are_labels_they_judge(tmp_path, tiny_recipe, capsys):
    given, folder = asked(tmp_path, tiny_recipe, trials=2, search=["learning_rate=1e-4..1e-2"]), tmp_path / "tuning"
    assert tune(given, folder, plan=planned, train=train_here, judge=nothing) == 0
    record = json.loads((folder / "tuning.json").read_text())
    assert record["space"] == {"learning_rate": [1e-4, 1e-2]}
    for number in (0, 1):
        results = json.loads((folder / f"trial0{number}-round1" / "results.json").read_text())
        assert record["rounds"][0]["figures"][str(number)] == {"knn": results["knn_accuracy"]["trained"]}
        assert results["linear_accuracy"] == {}
    assert "Judged by k-NN accuracy on held-out images" in capsys.readouterr().out


def test_numbers_are_those_of_the_objective(tiny_recipe):
    def keys(objective):
        recipe = resolve(
            tiny_recipe | {"dataset_name": "digits", "output_dir": "x", "objective": objective}
        ).to_recipe()
        return space_of({"search": {}}, recipe)

    space, first = keys("vicreg")
    assert space["learning_rate"] == [2e-4, 5e-3]
    assert space["vicreg.covariance_weight"] == [0.2, 5.0]
    assert first["vicreg.covariance_weight"] == 1.0
    assert keys("simclr")[0]["simclr.temperature"] == [0.05, 1.0]
    space, first = keys("mae+vicreg")
    assert set(space) == {"learning_rate", "views.crop_min_ratio", "objective_weights.vicreg"}
    for objective in ("vicregl", "barlow_twins", "sigreg", "byol", "mae", "simmim"):
        assert len(keys(objective)[0]) == 3
    with pytest.raises(InputError, match="`search`: expected a number for optim in the recipe, got 'adamw'"):
        space_of({"search": {"optim": [0, 1]}}, {"optim": "adamw"})


MISTAKES = {
    "time": (["--time_budget", "soon"], "`time_budget`: expected a time like 90s"),
    "trials": (["--trials", "1"], "`trials`: expected 2 to 1000, got 1"),
    "judge": (["--judge", "knnn"], "got 'knnn'; did you mean `knn`?"),
    "objective": (["--objective", "simclar"], "got 'simclar'; did you mean `simclr`?"),
    "range": (["--search", "learning_rate=1e-2..1e-3"], "`search`: expected KEY=LOW..HIGH"),
    "key": (["--search", "learning_rat=1e-3..1e-2"], "`learning_rat`: unknown key"),
    "value": (["--search", "views.crop_min_ratio=0.1..3"], "`views.crop_min_ratio`: expected"),
    "whole": (
        ["--search", "batch_size=10..20"],
        "`search`: expected a number that may have a fraction, got batch_size",
    ),
    "full": (["--output_dir", "full"], "`output_dir`: expected a new folder or one with tuning.json"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_bad_input_is_one_line_and_nothing_is_written(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("")
    before = sorted(tmp_path.rglob("*"))
    flags, said = MISTAKES[case]
    given = {"--time_budget": "1m", "--output_dir": "new"} | dict([flags])
    assert main(["tune", "digits", *(word for pair in given.items() for word in pair)]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert said in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.distributed
def test_a_tuning_that_is_killed_goes_on_from_the_checkpoint_of_its_trial(tmp_path, tiny_recipe, run_process):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe | SMALL | {"checkpointing_steps": 5}))
    words = [sys.executable, "-m", "hf_vicreg.cli", "tune", "digits", "--config", str(tmp_path / "recipe.yaml")]
    words += ["--judge", "lidar", "--trials", "2", "--time_budget", "2m", "--output_dir", str(tmp_path / "out")]
    process = run_process.start(words)
    deadline = time.monotonic() + 180
    while not list((tmp_path / "out").glob("trial00-round1/checkpoints/step_*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    time.sleep(20)  # the trial notices that nobody waits for it, and leaves a checkpoint
    done = run_process(words)
    assert done.returncode == 0, done.stderr
    assert "resumed from step_" in done.stderr
    assert "trying a few steps" not in done.stderr
    record = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert all(set(one) >= {"lidar", "rankme"} for one in record["rounds"][0]["figures"].values())
    assert done.stdout.startswith("| trial")
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("chosen", "crop", "used"),
    [(True, 0.2, 32), (True, 0.6, 28), (False, 0.6, 36)],
    ids=["as planned", "other crops", "given, or the source's"],
)
def test_a_trials_size_of_use_is_that_of_its_crops(chosen, crop, used):
    before = 32 if chosen else 36
    recipe = {"views": {"image_size": 24, "crop_min_ratio": 0.2}, "model": {"image_size": before, "patch_size": 4}}
    record = {"plan": {"recipe": recipe, "chooses_used_size": chosen}}
    settings = with_trial(record | {"trials": [{"views.crop_min_ratio": crop}]}, 0)
    assert (settings["views"]["crop_min_ratio"], settings["model"]["image_size"]) == (crop, used)
    assert recipe["model"]["image_size"] == before
    assert with_trial(record | {"trials": [{"learning_rate": 0.1}]}, 0)["model"]["image_size"] == before


PLAN = {
    "recipe": {
        "objective": "vicreg",
        "learning_rate": 1e-3,
        "views": {"crop_min_ratio": 0.2, "image_size": 32},
        "vicreg": {"covariance_weight": 1.0},
        "model": {"patch_size": 4},
        "logging_steps": 2,
    },
    "step_seconds": 1.0,
    "steps_per_epoch": 10,
    "labelled": True,
}


class Clock:
    """Seconds that pass where a trial takes them, and none elsewhere."""

    def __init__(self, monkeypatch, *, step_seconds, code_of=None):
        self.now, self.step_seconds, self.code_of, self.trained = 0.0, step_seconds, code_of or {}, []
        monkeypatch.setattr(runs.time, "monotonic", lambda: self.now)

    def train(self, flags):
        recipe, run = (flags[flags.index(flag) + 1] for flag in ("--config", "--output_dir"))
        run, steps = Path(run), yaml.safe_load(Path(recipe).read_text())["max_steps"]
        self.trained.append(run.name)
        run.mkdir(exist_ok=True)
        codes = self.code_of.get(run.name)
        if codes:
            self.now += 1
            return codes.pop(0)
        self.now += steps * self.step_seconds
        seconds = {"training_seconds": steps * self.step_seconds}
        accuracy = {"trained": 0.5 + 0.01 * int(run.name[5:7])}
        (run / "results.json").write_text(json.dumps({"steps": steps, "knn_accuracy": accuracy} | seconds))
        return 0


def started(folder, clock, **changes):
    """The exit code of a tuning of 1200 seconds whose steps were thought to take one, and what it has recorded."""
    given = {"seconds": 1200.0, "trials": 8, "judge": "knn", "seed": 0, "search": {}, "settings": {"vicreg": {}}}
    code = tune(given | changes, folder, plan=lambda *words: {"vicreg": PLAN}, train=clock.train, judge=nothing)
    return code, json.loads((folder / "tuning.json").read_text())


@pytest.mark.parametrize(
    ("step_seconds", "counts", "said"),
    [
        (1.0, [8, 4, 2], None),
        (2.0, [8, 2], None),
        (2.6, [8], "over before round 2: the best is that of the round before"),
        (4.0, [6], "over in round 1: the best is that of those that were tried"),
    ],
)
def test_trials_slower_than_planned_end_with_the_time_and_the_best_of_whole_rounds(
    step_seconds, counts, said, tmp_path, monkeypatch, capsys
):
    clock = Clock(monkeypatch, step_seconds=step_seconds)
    code, record = started(tmp_path / "tuning", clock)
    assert (code, [len(one["figures"]) for one in record["rounds"]]) == (0, counts)
    steps = [one["steps"] for one in record["rounds"]]
    assert steps == sorted(set(steps))
    assert clock.now <= 1200 + steps[-1] * step_seconds
    text = capsys.readouterr().out
    assert ("The time was over" in text) == (said is not None)
    assert said is None or said in text
    assert record["best"] == counts[0] - 1
    trained = list(clock.trained)
    assert started(tmp_path / "tuning", clock)[0] == 0  # again: the same, and nothing is trained
    assert clock.trained == trained
    assert capsys.readouterr().out == text


def test_a_round_that_the_time_cuts_off_does_not_choose(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch, step_seconds=1.0)
    train = clock.train

    def slower(flags):  # from the second round on
        clock.step_seconds = 9.0 if "round2" in flags[flags.index("--output_dir") + 1] else 1.0
        return train(flags)

    clock.train = slower
    clock.code_of = {"trial07-round2": [1]}  # the best of the first one
    code, record = started(tmp_path / "tuning", clock)
    assert (code, record["best"]) == (0, 7)
    assert [len(one["figures"]) for one in record["rounds"]] == [8, 2]
    assert "over in round 2: the best is that of the round before" in capsys.readouterr().out


def test_what_a_killed_tunings_trial_took_is_spent(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, step_seconds=1.0)
    train, folder = clock.train, tmp_path / "tuning"

    def killed(flags):  # with its parent, 400 seconds after it began
        if flags[flags.index("--output_dir") + 1].endswith("trial01-round1"):
            run = folder / "trial01-round1"
            run.mkdir()
            began = run.with_suffix(".yaml").stat().st_mtime
            (run / "log.jsonl").write_text("")
            os.utime(run / "log.jsonl", (began + 400, began + 400))
            raise KeyboardInterrupt
        return train(flags)

    clock.train = killed
    with pytest.raises(KeyboardInterrupt):
        started(folder, clock)
    before = json.loads((folder / "tuning.json").read_text())["spent"]
    clock.train = train
    code, record = started(folder, clock)
    assert code == 0
    assert record["spent"] == pytest.approx(clock.now + 400)
    assert before == record["rounds"][0]["steps"]
    assert "under_way" not in record


def test_a_killed_trial_is_tried_once_more_and_it_is_said_if_the_planned_one_is_missing(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch, step_seconds=1.0, code_of={"trial00-round1": [137], "trial02-round1": [1]})
    code, record = started(tmp_path / "once", clock, trials=3)
    assert clock.trained[:4] == ["trial00-round1", "trial01-round1", "trial02-round1", "trial00-round1"]
    assert (code, record["rounds"][1]["members"], record["failed"]) == (0, [1, 0], {"trial02-round1": 1})
    assert capsys.readouterr().out.startswith("| trial")
    clock = Clock(monkeypatch, step_seconds=1.0, code_of={"trial00-round1": [137, 137]})
    code, record = started(tmp_path / "twice", clock, trials=3)
    assert (code, clock.trained.count("trial00-round1"), record["failed"]) == (0, 2, {"trial00-round1": 137})
    assert record["rounds"][1]["members"] == [2, 1]
    text = (tmp_path / "twice" / "tuning.md").read_text()
    assert text.startswith(
        "Trial 0, which has what was planned, failed: whether tuning was worth it is not known.\n\n|"
    )


@pytest.mark.parametrize("given", [{}, {"logging_steps": 7}], ids=["planned", "given"])
def test_the_recipe_has_nothing_that_a_trials_length_chose(given, tmp_path, monkeypatch):
    monkeypatch.setitem(PLAN, "recipe", PLAN["recipe"] | given)
    clock = Clock(monkeypatch, step_seconds=1.0)
    assert started(tmp_path / "tuning", clock, trials=2, settings={"vicreg": given})[0] == 0
    recipe = yaml.safe_load((tmp_path / "tuning" / "tuned.yaml").read_text())
    assert recipe.get("logging_steps") == given.get("logging_steps")
    assert recipe["views"]["image_size"] == 32
