"""`--attn_implementation auto`: the fastest form is tried for, kept with the run, and the same in all processes."""

import json
import logging

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_vicreg import pretrain
from hf_vicreg.training.engine.encoders import AUTO, attention_of, well_formed

SMALL = {"patch_size": 4, "tile_size": 2}


def attention_in(folder, step):
    return json.loads((folder / "checkpoints" / f"step_{step:08}" / "state.json").read_text())["attention"]


def test_a_gpu_tries_by_itself_and_a_cpu_where_asked():
    assert attention_of(None, torch.device("cuda")) == AUTO
    assert attention_of(None, torch.device("cpu")) == "sdpa"
    assert attention_of("eager", torch.device("cuda")) == "eager"


@pytest.mark.parametrize("found", [{"axb": "dense"}, {"8": "dense"}, {"8x8": 3}], ids=["words", "side", "number"])
def test_what_is_no_choice_is_chosen_anew(found):
    assert well_formed(found) == {}
    assert well_formed({"8x8": "dense"}) == {"8x8": "dense"}


def test_a_run_keeps_the_forms_it_began_with(tmp_path, tiny_recipe, image_folder, caplog):
    caplog.set_level(logging.INFO, "hf_vicreg")
    settings = {"data": image_folder(40), "attn_implementation": "auto", "batch_size": 16, "max_steps": 4}
    settings |= {"model": tiny_recipe.pop("model") | SMALL, "checkpointing_steps": 2}
    settings |= {"views": {"num_local_views": 1, "local_image_size": 16}}
    settings = tiny_recipe | settings
    whole = tmp_path / "whole"
    pretrain(out=whole, **settings)
    first = attention_in(whole, 4)
    assert first.keys() == {"8x8", "4x4"}  # one for each size of views
    assert set(first.values()) <= {"dense", "blocks", "gathered"}
    assert "the fastest of those tried: 8x8" in caplog.text
    caplog.clear()
    (whole / "model.safetensors").unlink()
    (whole / "results.json").unlink()
    (torn := whole / "checkpoints" / "step_00000004" / "state.json").write_text(torn.read_text()[:9])
    pretrain(out=whole, **settings, resume_from_checkpoint="latest")
    assert "trying which form" not in caplog.text
    assert "as the run began with: 8x8" in caplog.text
    assert attention_in(whole, 4) == first


@pytest.mark.distributed
def test_two_processes_take_the_same_forms(tmp_path, tiny_recipe, image_folder, ranks):
    settings = tiny_recipe | {"attn_implementation": "auto", "batch_size": 16, "max_steps": 2}
    settings["model"] |= SMALL
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    where = ["--config", tmp_path / "recipe.yaml", "--train_dir", image_folder(40), "--output_dir", tmp_path / "out"]
    found = ranks(2, "-m", "hf_vicreg.training.pretrain", *where)
    assert found.returncode == 0, found.stderr
    assert "2 process(es)" in found.stderr
    assert found.stderr.count("the fastest of those tried") == 1
    assert all(one.isfinite().all() for one in load_file(tmp_path / "out" / "model.safetensors").values())
