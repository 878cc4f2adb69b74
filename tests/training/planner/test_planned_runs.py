"""Runs that plan themselves: what is written, kept and refused."""

import json
import re

import numpy as np
import pytest
import tifffile
import yaml
from transformers import AutoModel

import hf_vicreg
from hf_vicreg.cli import main
from hf_vicreg.training.engine import loop
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.planner import plan, trial
from hf_vicreg.training.planner.table import say_defaults
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.run.settings import explicit_settings

SMALL = {"model": {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}}
# a machine under test is slow and shared: the time is given for more than it can need
QUICK = SMALL | {
    "max_train_samples": 64,
    "batch_size": 32,
    "vicreg": {"expander_sizes": [32, 32]},
    "num_train_epochs": 1,
}


def test_a_run_without_a_recipe_plans_itself(tmp_path, image_folder, caplog):
    caplog.set_level("INFO", "hf_vicreg")
    result = hf_vicreg.pretrain(data=image_folder(40), out=tmp_path / "run", time_budget="10m", **QUICK)
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["num_train_epochs"] == 1
    assert recipe["model"]["hidden_size"] == 32
    assert (recipe["model"]["tile_size"], recipe["views"]["image_size"]) == (1, 24), "small images, small views"
    assert recipe["model"]["image_size"] == 32, "the encoder is used with what a crop was cut from"
    assert recipe["time_budget"] == "10m"
    assert recipe["dataloader_num_workers"] is not None
    assert result.results["attention_density"] <= 0.6
    assert result.results["steps"] == 1
    plan = next(one.message for one in caplog.records if one.message.startswith("Plan for 40 images of about 36 x 36"))
    assert re.search(r"length +1 steps, 1 epochs +given", plan), "the length that it has, not a default"
    assert sum("no difference to the loss" in one.message for one in caplog.records) == 1, "each thing once"
    assert AutoModel.from_pretrained(tmp_path / "run").config.hidden_size == 32


def test_the_time_sets_the_length(tmp_path, image_folder, capsys):
    few = SMALL | {"batch_size": 16, "vicreg": {"expander_sizes": [32, 32]}, "plan_only": True}
    images, lengths = image_folder(1000), []
    for budget in ("2m", "30m"):
        hf_vicreg.pretrain(data=images, out=tmp_path / "run", time_budget=budget, **few)
        lengths.append(int(re.search(r"length +([\d,]+) steps", capsys.readouterr().out)[1].replace(",", "")))
    assert 62 <= lengths[0] < lengths[1] <= 62_000
    assert not (tmp_path / "run").exists(), "a mere plan writes nothing"


def test_a_length_that_is_given_holds_where_no_time_is(tmp_path, image_folder, monkeypatch):
    """Three hours, which nobody gave, are less than one pass over some sets of images."""
    monkeypatch.setattr(plan, "EVENING_SECONDS", 1.0)
    images = image_folder(40)
    length = {"num_train_epochs": None, "max_steps": 1}
    for name, more in {"steps": length, "epochs": {}}.items():
        assert hf_vicreg.pretrain(data=images, out=tmp_path / name, **QUICK | more).results["steps"] == 1
    with pytest.raises(InputError, match="expected time for one pass"):
        hf_vicreg.pretrain(data=images, out=tmp_path / "open", **QUICK | {"num_train_epochs": None})


@pytest.mark.parametrize(("slow", "steps"), [(0.0, 2), (1e9, 4)])
def test_of_slow_steps_one_is_tried_after_the_first(slow, steps, tmp_path, image_folder, monkeypatch):
    taken = []
    take = loop.TrainingLoop._take
    monkeypatch.setattr(loop, "SLOW_STEP_S", slow)
    monkeypatch.setattr(trial, "TRIAL_SECONDS", (1e-9, 1e-9))
    monkeypatch.setattr(loop.TrainingLoop, "_take", lambda *arguments: taken.append(1) or take(*arguments))
    flags = {"plan_only": True, "dataloader_num_workers": 0}
    hf_vicreg.pretrain(data=image_folder(40), out=tmp_path / "run", time_budget="10m", **QUICK, **flags)
    assert len(taken) == steps


def test_a_plan_is_printed_and_nothing_is_written(tmp_path, image_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--plan_only", "--max_memory", "6g", "--model.hidden_size", "32", "--model.num_attention_heads", "2"]
    flags += ["--model.image_size", "12"]  # fewer pixels than a patch has that nobody chose
    assert main(["pretrain", str(image_folder(40)), *flags]) == 0
    printed = capsys.readouterr().out
    assert "Plan for 40 images" in printed
    assert "images a second" in printed
    assert "of 6.0 GB" in printed
    assert "that of photographs  " in printed
    assert "--views.preset has microscopy, pathology, satellite, medical" in printed
    assert not (tmp_path / "runs").exists()


def test_a_plan_with_a_preset_advises_none(tmp_path, image_folder, capsys):
    flags = [
        "--plan_only",
        "--model.hidden_size",
        "32",
        "--model.num_attention_heads",
        "2",
        "--views.preset",
        "medical",
    ]
    assert main(["pretrain", str(image_folder(40)), *flags, "--output_dir", str(tmp_path / "run")]) == 0
    assert "augmentation" not in capsys.readouterr().out


@pytest.mark.distributed
def test_two_processes_agree_on_one_plan(tmp_path, image_folder, ranks):
    flags = ["--plan_only", "--time_budget", "20m", "--model.hidden_size", "32", "--model.num_attention_heads", "2"]
    module = "hf_vicreg.training.pretrain"
    found = ranks(2, "-m", module, image_folder(40), *flags, "--output_dir", tmp_path / "out")
    assert found.returncode == 0, found.stderr
    assert "device cpu, 2 process(es)" in found.stderr
    assert found.stdout.count("Plan for 40 images") == 1
    assert "Traceback" not in found.stderr


def test_a_resumed_run_keeps_its_plan(tmp_path, image_folder):
    images, out = image_folder(40), tmp_path / "run"
    first = hf_vicreg.pretrain(data=images, out=out, time_budget="10m", **QUICK)
    recipe = (out / "recipe.yaml").read_text()
    again = hf_vicreg.pretrain(data=images, out=out, resume_from_checkpoint="latest", time_budget="20m")
    assert again.results["steps"] == first.results["steps"]
    kept = yaml.safe_load((out / "recipe.yaml").read_text())
    before = yaml.safe_load(recipe)
    assert {key: one for key, one in kept.items() if before[key] != one}.keys() <= {
        "resume_from_checkpoint",
        "time_budget",
    }
    assert json.loads((out / "results.json").read_text())["planned_steps"] == 1


def test_a_flag_to_resume_what_has_not_begun_leaves_it_planned(tmp_path, image_folder, capsys):
    flags = {"resume_from_checkpoint": "latest", "plan_only": True, "time_budget": "10m"}
    hf_vicreg.pretrain(data=image_folder(40), out=tmp_path / "run", **QUICK, **flags)
    assert "Plan for 40 images" in capsys.readouterr().out


def test_a_planned_run_is_repeated_by_its_recipe(tiny_recipe, tmp_path):
    """Its time has decided on its length already: another machine would find another one."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe | {"max_steps": 24, "time_budget": "4m"}))
    settings = explicit_settings({"config": str(recipe), "data": "digits"})
    assert settings["max_steps"] == 24
    assert "time_budget" not in settings
    recipe.write_text(yaml.safe_dump({"time_budget": "4m"}))
    assert explicit_settings({"config": str(recipe), "data": "digits"})["time_budget"] == "4m"


def test_a_recipe_with_a_time_gives_up_its_length(tmp_path, image_folder, tiny_recipe):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe | {"num_train_epochs": 7}))
    settings = hf_vicreg.training.run.settings.explicit_settings(
        {"config": str(recipe), "time_budget": "2m", "data": "digits"}
    )
    assert "num_train_epochs" not in settings
    assert settings["batch_size"] == tiny_recipe["batch_size"]


@pytest.mark.parametrize(
    ("more", "count", "message"),
    [
        ({"time_budget": "1s"}, 40, "`time_budget`: expected time for one pass"),
        ({}, 15, "`data`: expected at least 16 usable images, found 15 of 15 in .*; give more"),
        ({"max_memory": "1m"}, 40, "`max_memory`: expected about"),
        ({"time_budget": "soon"}, 40, "`time_budget`: expected a time like"),
    ],
    ids=["time", "images", "memory", "words"],
)
def test_what_cannot_be_planned_is_refused_and_nothing_is_written(tmp_path, image_folder, more, count, message):
    few = {key: value for key, value in QUICK.items() if key not in ("num_train_epochs", "batch_size")}
    with pytest.raises(InputError, match=message):
        hf_vicreg.pretrain(data=image_folder(count), out=tmp_path / "run", **few, **more)
    assert not (tmp_path / "run").exists()


def test_images_that_all_want_a_flag_say_which(tmp_path):
    (tmp_path / "cells").mkdir()
    for index in range(20):
        tifffile.imwrite(
            tmp_path / "cells" / f"{index}.tif", np.zeros((4, 40, 40), np.uint16), photometric="minisblack"
        )
    with pytest.raises(InputError, match=r"found 0 of 20 in cells; of the others, 0.tif: .*--model.num_channels 4"):
        hf_vicreg.pretrain(data=tmp_path / "cells", out=tmp_path / "run", time_budget="10m")


def test_an_expander_that_nobody_chose_is_said(caplog):
    caplog.set_level("INFO", "hf_vicreg")
    given = {"data": "digits", "output_dir": "x", "model": {"hidden_size": 192}, "batch_size": 8, "max_steps": 1}
    masked, chosen = {"objective": "mae"}, {"vicreg": {"expander_sizes": [16, 16]}}
    for further, said in (({}, 1), (masked, 1), (chosen, 1)):
        say_defaults(explicit_settings(given | further), resolve(given | further))
        assert len(caplog.records) == said
    assert "the expander is 8192-8192-8192, the default" in caplog.text
