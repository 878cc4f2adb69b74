"""The objective of a run and its section: given, stored, given way to, and refused in one line."""

import logging

import pytest

from hf_vicreg.modeling.objectives import OBJECTIVES
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.objectives.registry import ENTRIES, entry_of
from hf_vicreg.training.run.flags import parse_flags, pretrain_parser
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.run.settings import explicit_settings

RUN = {"dataset_name": "digits", "output_dir": "x"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_the_command_line_says_is_what_the_model_has(name):
    entry, kind = ENTRIES[name], OBJECTIVES[name]
    assert {key: flag.default for key, flag in entry.settings.items()} == kind.defaults
    assert entry.takes_places == kind.needs_tokens
    assert entry.encodes == kind.encodes
    shown = pretrain_parser().format_help()
    assert "--views.preset" in shown
    for key in kind.defaults:
        assert f"--{name}.{key}" in shown
    config = resolve(RUN | {"objective": name})
    assert config.vicreg.objective == name
    assert config.to_recipe()["objective"] == name
    if kind.defaults:
        assert config.to_recipe()[name] == kind.defaults
        again = {key: one for key, one in config.to_recipe().items() if one is not None}
        assert resolve(again).to_recipe() == config.to_recipe()


def test_the_default_leaves_recipes_as_they_were():
    recipe = resolve(RUN).to_recipe()
    assert recipe["objective"] == "vicreg"
    assert not recipe.keys() & (ENTRIES.keys() - {"vicreg"})
    assert "objective" not in recipe["vicreg"]


def test_flags_are_those_of_the_section():
    given = parse_flags(["digits", "--objective", "simclr", "--simclr.temperature", "1e-1", "--output_dir", "x"])
    config = resolve(given)
    assert config.vicreg.objective_settings == {"temperature": 0.1}


def test_a_recipe_gives_way_to_another_objective(tmp_path, caplog):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("objective: byol\nbyol: {momentum: 0.9}\nvicreg: {expander_sizes: [64, 32]}\n")
    with caplog.at_level(logging.INFO):
        settings = explicit_settings(RUN | {"config": str(recipe), "objective": "simclr"})
    assert "`byol.momentum` are left out for simclr" in caplog.text
    config = resolve(settings)
    assert config.vicreg.objective_settings == {"temperature": 0.5}
    assert list(config.vicreg.expander_sizes) == [64, 32]
    recipe.write_text("vicreg: {expander_sizes: [64, 32], gamma: 2.0}\n")
    kept = explicit_settings(RUN | {"config": str(recipe), "objective": "sigreg"})
    assert kept["vicreg"] == {"expander_sizes": [64, 32]}
    # sections of several, the default's own among those asked for
    recipe.write_text("vicreg: {gamma: 2.0}\nsimclr: {temperature: 0.3}\nbyol: {momentum: 0.9}\n")
    for name, section in (("vicreg", {"gamma": 2.0}), ("simclr", {"temperature": 0.3})):
        kept = explicit_settings(RUN | {"config": str(recipe), "objective": name})
        assert kept[name] == section
        assert "byol" not in kept
    with pytest.raises(InputError, match=r"`simclr.temperature`: expected no setting of another objective"):
        explicit_settings(RUN | {"config": str(recipe)})


def test_several_have_their_sections_and_their_weights(tmp_path, caplog):
    flags = ["digits", "--objective", "simclr+byol", "--objective_weights.byol", "3", "--simclr.temperature", "0.3"]
    config = resolve(parse_flags([*flags, "--output_dir", "x"]))
    weights = {"simclr": 1.0, "byol": 3.0}
    settings = {"simclr": {"temperature": 0.3}, "byol": {"momentum": 0.996}}
    assert config.vicreg.objective_settings == settings | {"weights": weights}
    recipe = config.to_recipe()
    assert recipe["objective"] == "simclr+byol"
    assert (recipe["objective_weights"], recipe["simclr"], recipe["byol"]) == (weights, *settings.values())
    assert resolve({key: one for key, one in recipe.items() if one is not None}).to_recipe() == recipe
    assert "--objective_weights.NAME" in pretrain_parser().format_help()
    path = tmp_path / "recipe.yaml"
    path.write_text("objective_weights: {byol: 2, simclr: 3}\nsimclr: {temperature: 0.3}\n")
    with caplog.at_level(logging.INFO):
        assert "objective_weights" not in explicit_settings(RUN | {"config": str(path), "objective": "simclr"})
    assert "`objective_weights.byol`, `objective_weights.simclr` are left out for simclr" in caplog.text


def test_what_is_said_of_several_is_what_is_said_of_each():
    mae, vicreg, both = (entry_of({"objective": name}) for name in ("mae", "vicreg", "mae+vicreg"))
    assert both.title == f"{mae.title} and {vicreg.title}"
    assert both.parts[:2] == ("mae_loss", "mae_reconstruction")
    assert both.parts[2:] == tuple(f"vicreg_{one}" for one in ("loss", *vicreg.parts))
    assert both.whole_patches
    assert both.encodes
    assert both.uses_expander
    assert both.expander_sizes(64) == vicreg.expander_sizes(64)
    assert not both.silent  # VICReg's embeddings may collapse
    sphere = entry_of({"objective": "simclr+mae"})
    assert sphere.unit_sphere
    assert not sphere.vicreg_weights
    assert "batch too small" in sphere.silent
    assert not entry_of({"objective": "simclr+vicreg"}).unit_sphere


BAD = {
    "unknown one": (
        {"objective": "mae+simclar"},
        r"`objective`: expected one of .* with \+ between, got 'mae\+simclar'; did you mean `simclr`\?$",
    ),
    "masks": ({"objective": "mae+simmim"}, r"`objective`: expected one method that masks images at most"),
    "beside masks": ({"objective": "mae+vicreg", "teacher": "x"}, r"`teacher`: expected none with objective 'mae\+vi"),
    "local views": (
        {
            "objective": "mae",
            "views": {"image_size": 64, "num_local_views": 2, "local_image_size": 16},
            "model": {"patch_size": 4, "tile_size": 4},
        },
        r"`views.local_image_size`: .*`mask_tile_size`: expected at least two tiles of \(4, 4\) patches",
    ),
    "weight": ({"objective": "mae+simclr", "objective_weights": {"mae": -2}}, r"`objective_weights.mae`: expected at"),
    "weight of none": ({"objective_weights": {"mae": 2}}, r"`objective_weights.mae`: expected no setting of another"),
    "key of one": ({"objective": "mae+simclr", "simclr": {"zzz": 1}}, r"`simclr.zzz`: unknown key\.$"),
    "unknown": ({"objective": "simclar"}, r"`objective`: expected one of .*, got 'simclar'; did you mean `simclr`\?$"),
    "beginning": ({"objective": "simclr", "simclr": {"temp": 1}}, r"unknown key; did you mean `temperature`\?$"),
    "unlike any": ({"objective": "simclr", "simclr": {"zzz": 1}}, r"`simclr.zzz`: unknown key\.$"),
    "weight of a teacher": ({"teacher_weight": 3}, r"`teacher_weight`: expected a `teacher` beside it, got none"),
    "key": ({"objective": "simclr", "simclr": {"temprature": 1}}, r"`simclr.temprature`: unknown key; did you mean"),
    "other": (
        {"simclr": {"temperature": 1}},
        r"`simclr.temperature`: expected no setting of another objective than 'vi",
    ),
    "weights": ({"objective": "byol", "vicreg": {"gamma": 2}}, r"`vicreg.gamma`: expected no setting of another"),
    "pairs": (
        {"objective": "simclr", "vicreg": {"pair_loss": "infonce"}, "second_model": {"hidden_size": 192}},
        r"`vicreg.pair_loss`: expected no setting of another",
    ),
    "branches": (
        {"objective": "byol", "second_model": {"hidden_size": 192}},
        r"`second_model`: expected none with objective 'byol': its predictor",
    ),
    "patches": (
        {"objective": "vicregl", "second_model": {"hidden_size": 192}},
        r"`second_model`: expected none with objective 'vicregl'",
    ),
    "temperature": (
        {"objective": "simclr", "simclr": {"temperature": 0}},
        r"`simclr`: .*`temperature`: .* above 0, got",
    ),
    "nan": (
        {"objective": "simclr", "simclr": {"temperature": float("nan")}},
        r"`temperature`: expected a number above",
    ),
    "text": (
        {"objective": "simclr", "simclr": {"temperature": "warm"}},
        r"`temperature`: expected a number, got 'warm'",
    ),
    "none": (
        {"objective": "sigreg", "sigreg": {"num_slices": None}},
        r"`num_slices`: expected a whole number, got None",
    ),
    "share": (
        {"objective": "sigreg", "sigreg": {"sketch_weight": 2}},
        r"`sketch_weight`: expected a number from 0 to 1",
    ),
    "slices": ({"objective": "sigreg", "sigreg": {"num_slices": 0.5}}, r"`num_slices`: expected a whole number"),
    "momentum": ({"objective": "byol", "byol": {"momentum": -1}}, r"`momentum`: expected a number from 0 to 1"),
    "matches": ({"objective": "vicregl", "vicregl": {"num_matches": [3]}}, r"`num_matches`: expected two numbers"),
    "redundancy": (
        {"objective": "barlow_twins", "barlow_twins": {"redundancy_weight": -1}},
        r"`redundancy_weight`: expected at least 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_get_one_line(case):
    given, message = BAD[case]
    with pytest.raises(InputError, match=message) as raised:
        resolve(RUN | given)
    assert "\n" not in str(raised.value)
