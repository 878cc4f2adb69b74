"""A run of every objective: logged, exported, killed and resumed bit for bit, warm-started, published."""

import copy
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining

from hf_vicreg import pretrain
from hf_vicreg.modeling.objectives import OBJECTIVES, complete_settings
from hf_vicreg.publishing.staging import stage
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.monitor.run_log import LOG_FILE, read_log
from hf_vicreg.training.objectives.registry import entry_of

STEPS = 4
# a run takes a second or two: those that keep something beside weights and optimiser stand for the others
SIBLINGS = dict.fromkeys(("barlow_twins", "simclr", "mae"), pytest.mark.slow)
SEVERAL = "mae+byol"
OTHERS = [pytest.param(name, marks=SIBLINGS.get(name, ())) for name in (*OBJECTIVES, SEVERAL) if name != "vicreg"]
SETTINGS = {
    "vicregl": {"vicregl": {"num_matches": [5, 2], "local_expander_sizes": [16, 16]}},
    "sigreg": {"sigreg": {"num_slices": 16}},
    SEVERAL: {"mae": {"mask_ratio": 0.5}, "objective_weights": {"byol": 0.5}},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for index in range(24):
        pixels = torch.randint(0, 256, (36, 30, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(folder / f"{index:04d}.png")
    return folder


@pytest.fixture(scope="module")
def run_of(request, images, tmp_path_factory):
    """Returns a function that gives the finished run of an objective, which is made once."""
    conftest = request.config.pluginmanager.get_plugin(str(request.config.rootpath / "tests" / "conftest.py"))
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(name):
        settings = copy.deepcopy(conftest.TINY_RECIPE) | {
            "objective": name,
            "batch_size": 4,
            "statistics_batch_size": 8,
            "max_steps": STEPS,
            "checkpointing_steps": 2,
            "checkpoints_total_limit": 4,
            "views": {"num_local_views": 1, "local_image_size": 16, "rotation_degrees": 10.0},
        }
        settings["model"]["drop_path_rate"] = 0.2
        settings |= SETTINGS.get(name, {})
        if name not in made:
            threads = torch.get_num_threads()
            pretrain(out=folder / name, data=images, **settings)
            torch.set_num_threads(threads)
            made[name] = folder / name
        return made[name], settings

    return get


@pytest.mark.parametrize("name", OTHERS)
def test_a_killed_run_goes_on_bit_for_bit(name, run_of, images, tmp_path):
    whole, settings = run_of(name)
    killed = tmp_path / name
    (killed / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "recipe.yaml", killed)
    shutil.copytree(whole / "checkpoints" / "step_00000002", killed / "checkpoints" / "step_00000002")
    pretrain(out=killed, data=images, resume_from_checkpoint="latest", **settings)
    for part in ("model.safetensors", "optimizer.safetensors"):
        paths = [folder / "checkpoints" / f"step_{STEPS:08d}" / part for folder in (whole, killed)]
        one, other = (load_file(path) for path in paths)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    weights = load_file(paths[0].with_name("model.safetensors"))
    assert any(key.startswith("objective.") and ".teacher." in key for key in weights) == ("byol" in name)


@pytest.mark.parametrize("name", OTHERS)
def test_log_card_and_folder_are_of_the_objective(name, run_of, images, tmp_path):
    folder, settings = run_of(name)
    entry = entry_of({"objective": name})
    for record in read_log(folder / LOG_FILE):
        assert entry.parts == tuple(key for key in record if key in entry.parts)
        assert all(torch.isfinite(torch.tensor(record[key])) for key in ("loss", *entry.parts))
    card = (folder / "README.md").read_text()
    assert f"pretrained without labels by {entry.title} on" in card
    assert all(f"| its {part}, unweighted |" in card for part in entry.parts)
    encoder = AutoModel.from_pretrained(folder)
    assert encoder(pixel_values=torch.zeros(1, 3, 32, 32)).pooler_output.shape == (1, 32)
    wrapper = AutoModelForPreTraining.from_pretrained(folder / "pretraining")
    assert wrapper.config.objective == name
    own = SETTINGS.get(name, {})
    given = own.get(name, {}) if name != SEVERAL else {"mae": own["mae"], "weights": own["objective_weights"]}
    assert wrapper.objective.settings == complete_settings(name, given)
    stored = load_file(folder / "pretraining" / "model.safetensors")
    assert all(torch.equal(one, stored[key]) for key, one in wrapper.state_dict().items() if key in stored)
    (tmp_path / "staged").mkdir()
    stage(folder, tmp_path / "staged", repo="lab/demo", include_pretraining=True)
    assert json.loads((tmp_path / "staged" / "results.json").read_text())["objective"] == name
    # a checkpoint of another objective
    others = {key: one for key, one in settings.items() if key not in ("objective", *SETTINGS.get(name, {}))}
    with pytest.raises(InputError, match=r"`objective` is 'vicreg', the checkpoint has"):
        pretrain(out=folder, data=images, resume_from_checkpoint="latest", **others)


def test_a_teacher_begins_with_the_weights_of_a_warm_start(run_of, images, tmp_path):
    source, settings = run_of("sigreg")
    settings = {key: one for key, one in settings.items() if key not in ("sigreg", "model")}
    settings |= {"objective": "byol", "max_steps": 1, "learning_rate": 0.0, "model_name_or_path": str(source)}
    pretrain(out=tmp_path / "run", data=images, **settings)
    weights = load_file(source / "model.safetensors")
    stored = load_file(tmp_path / "run" / "pretraining" / "model.safetensors")
    for key, one in weights.items():
        torch.testing.assert_close(stored[f"objective.teacher.encoder.{key}"], one, rtol=0, atol=1e-6)


def test_patches_need_an_encoder_that_has_them(images, tmp_path):
    swin = {
        "model_type": "swin",
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
    }
    swin |= {"window_size": 4}
    with pytest.raises(InputError, match=r"`objective`: expected a model with a token for each patch, 'swin'"):
        pretrain(out=tmp_path / "run", data=images, objective="vicregl", model=swin, batch_size=8, max_steps=1)
    assert not (tmp_path / "run").exists()
