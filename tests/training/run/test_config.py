"""Recipes, flags and their errors."""

import json

import pytest
import yaml

from hf_vicreg import BigBirdViTConfig
from hf_vicreg.training.building import attention_density
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.run.arguments import bytes_of, seconds_of
from hf_vicreg.training.run.flags import parse_flags
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.run.settings import explicit_settings, read_recipe, recipe_names

NEEDED = {"output_dir": "somewhere", "dataset_name": "digits"}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_is_sparse(name):
    config = resolve(NEEDED | {"config": name})
    assert attention_density(config) <= 0.6


def test_recipes_that_come_with_the_package():
    assert recipe_names() == ["cifar10_cpu", "cifar10_cpu_long", "cifar10_gpu", "digits", "imagenet_small_patch16"]


def test_flags_override_the_recipe_which_overrides_defaults():
    given = parse_flags(
        [
            "--config",
            "digits",
            "--learning_rate",
            "1e-3",
            "--model.tile_size=2",
            "--views.hue",
            "0.2",
            "--output_dir",
            "x",
        ]
    )
    config = resolve(given)
    assert config.run.learning_rate == 1e-3
    assert config.vicreg.encoder.tile_size == 2
    assert config.views.hue == 0.2
    assert config.run.dataset_name == "digits"  # the recipe's
    assert config.vicreg.encoder.hidden_size == 128
    assert config.run.weight_decay == 0.05  # the default


@pytest.mark.parametrize(
    ("flags", "expected"), [([], False), (["--torch_compile"], True), (["--torch_compile", "false"], False)]
)
def test_switches_are_flags_with_or_without_a_value(flags, expected):
    assert resolve(NEEDED | parse_flags(flags)).run.torch_compile is expected


def test_resolved_configuration_reads_back_as_itself(tmp_path):
    first = resolve(NEEDED | {"config": "cifar10_cpu", "model": {"tile_size": [2, 4]}})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(first.to_recipe()))
    second = resolve({"config": str(path)})
    assert second.to_recipe() == first.to_recipe()
    assert second.vicreg.to_dict() == first.vicreg.to_dict()


def test_model_may_be_a_configuration_object():
    config = resolve(NEEDED | {"model": BigBirdViTConfig(hidden_size=64, num_attention_heads=4, tile_size=2)})
    assert config.vicreg.encoder.hidden_size == 64
    assert config.vicreg.encoder.tile_size == 2


def test_model_may_be_the_configuration_of_an_earlier_run(tmp_path):
    BigBirdViTConfig(hidden_size=64, num_attention_heads=4, tile_size=2, dtype="float32").save_pretrained(tmp_path)
    config = resolve(NEEDED | {"model": BigBirdViTConfig.from_pretrained(tmp_path)})
    assert config.vicreg.encoder.hidden_size == 64


def test_data_given_beside_a_recipe_replaces_the_recipes():
    config = resolve({"output_dir": "x", "config": "digits", "train_dir": "images"})
    assert (config.run.dataset_name, config.run.train_dir) == (None, "images")


def test_recipe_survives_json():
    resnet = {"model_type": "resnet", "hidden_sizes": [8, 16], "depths": [1, 1], "id2label": {0: "a", 1: "b", 2: "c"}}
    recipe = resolve(NEEDED | {"model": resnet}).to_recipe()
    assert json.loads(json.dumps(recipe)) == recipe


def test_another_encoder_by_its_model_type():
    config = resolve(NEEDED | {"model": {"model_type": "resnet", "hidden_sizes": [8, 16], "depths": [1, 1]}})
    assert config.vicreg.encoder.model_type == "resnet"


def test_yaml_reads_exponents_without_a_dot_as_text_and_we_do_not(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rate: 1e-3\n")
    assert resolve(NEEDED | {"config": str(path)}).run.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rat": 1}, "`learning_rat`: unknown key in arguments; did you mean `learning_rate`?"),
        ({"model": {"tile_sise": 1}}, "`model.tile_sise`: unknown key; did you mean `tile_size`?"),
        ({"vicreg": {"expander": [1]}}, "`vicreg.expander`: unknown key"),
        ({"views": {"blurr": 1}}, "`views.blurr`: unknown key"),
        ({"views": {"hue": 0.7}}, "`views.hue`: expected a number from 0 to 0.5, got 0.7"),
        ({"model": {"hidden_size": "wide"}}, "hidden_size"),
        ({"model": {"window_size": 2}}, "`window_size`: expected an odd number"),
        ({"model": 3}, "`model`: expected a mapping"),
        ({"batch_size": 1}, "`batch_size`: expected at least 2 images for a covariance, got 1"),
        ({"batch_size": 2.5}, "`batch_size`: expected int, got 2.5"),
        ({"batch_size": "many"}, "`batch_size`: expected int, got 'many'"),
        ({"num_train_epochs": 0}, "`num_train_epochs`: expected at least 1, got 0"),
        ({"mixed_precision": "fp8"}, "`mixed_precision`"),
        ({"optim": "sgd"}, "`optim`: expected 'adamw' or 'lars', got 'sgd'"),
        ({"min_learning_rate": 1}, "`min_learning_rate`: expected at most `learning_rate` 0.0005, got 1.0"),
        ({"max_time": -1}, "`max_time`: expected at least 0, got -1.0"),
        ({"max_skipped_steps": 0}, "`max_skipped_steps`: expected at least 1, got 0"),
        ({"checkpoints_keep_every_steps": 700}, "expected a multiple of the 500 `checkpointing_steps`, got 700"),
        ({"torch_compile": "yes"}, "`torch_compile`: expected bool, got 'yes'"),
        ({"gradient_checkpointing": 1}, "`gradient_checkpointing`: expected bool, got 1"),
        ({"seed": -1}, "`seed`: expected an integer from 0 to"),
        ({"warmup_ratio": 5}, "`warmup_ratio`: expected a share of the steps from 0 to 1, got 5.0"),
        ({"learning_rate": float("inf")}, "`learning_rate`: expected"),
        ({"batch_size": float("inf")}, "`batch_size`: expected int, got inf"),
        ({"model": {"hidden_act": "foo"}}, "`hidden_act`: expected an activation"),
        (
            {"model": {"num_channels": 65}},
            "`model.num_channels`: expected 1 to 64, got 65",
        ),
        ({"model": {"return_dict": False}}, "`model.return_dict`: unknown key"),
        ({"views": {1: 2}}, "`views.1`: unknown key"),
        ({"model": {"model_type": "resnett"}}, "got 'resnett'; did you mean `resnet`?"),
        ({"config": "no_such_recipe"}, "`config`: expected a YAML file or one of"),
        ({"train_dir": "x"}, "expected one of the two, got both"),
        ({"dataset_name": ""}, "expected one of the two, got none"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_named(given, message):
    with pytest.raises(InputError) as error:
        resolve(NEEDED | given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_recipe_files_are_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    for text, message in (
        ("- a list", "expected a mapping"),
        ("key: [", "is not YAML"),
        ("seed: 2001-99-99", "is not YAML"),
        ("3: 4", "`3`: unknown key"),
        ("epochs: 3", "`epochs`: unknown key in recipe"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            resolve(NEEDED | {"config": str(path)})
    assert read_recipe("digits")["dataset_name"] == "digits"


@pytest.mark.parametrize(
    "flags",
    [
        ["--no_such_flag", "1"],
        ["--model.tile_size"],
        ["--other.key", "1"],
        ["--batch_size", "many"],
        ["--model.tile_size", "[2"],
        ["--seed"],
    ],
)
def test_bad_flags_are_named(flags):
    with pytest.raises(InputError, match=flags[0].lstrip("-")):
        parse_flags(["--config", "digits", *flags])


def test_missing_output_dir_is_named():
    with pytest.raises(InputError, match="`output_dir`: expected a folder"):
        resolve({"config": "digits"})


def test_switching_encoders_leaves_out_the_recipes_fields_of_the_other(caplog):
    caplog.set_level("INFO", logger="hf_vicreg")
    config = resolve(
        NEEDED
        | {"config": "cifar10_cpu"}
        | parse_flags(
            ["--model.model_type", "resnet", "--model.hidden_sizes", "[64, 128]", "--model.depths", "[1, 1]"]
        )
    )
    assert config.vicreg.encoder.model_type == "resnet"
    assert config.vicreg.encoder.hidden_sizes == [64, 128]
    assert config.image_size == (24, 24)  # what the recipe's encoder had is the views' size
    assert config.views.crop_min_ratio == 0.2  # the rest of the recipe stays
    (line,) = [one for one in caplog.messages if "left out" in one]
    assert "`model.hidden_size`" in line
    assert line.endswith("are a bigbird_vit's, and left out for a resnet")


def test_switching_to_an_encoder_with_the_same_fields_keeps_those_given_alone():
    vit = {"model_type": "vit", "hidden_size": 96, "num_attention_heads": 4}
    config = resolve(NEEDED | {"config": "cifar10_cpu", "model": vit})
    assert config.vicreg.encoder.hidden_size == 96
    assert config.vicreg.encoder.num_hidden_layers == 12  # a ViT's own, not the recipe's 3
    assert config.vicreg.encoder.image_size == 24
    given = resolve(NEEDED | {"config": "cifar10_cpu", "model": vit | {"image_size": 48}})
    assert given.image_size == (48, 48)


def test_switching_the_second_encoder(tmp_path):
    second = {"model_type": "resnet", "hidden_sizes": [8], "depths": [1]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"second_model": {"hidden_size": 64, "num_attention_heads": 4}}))
    config = resolve(NEEDED | {"config": str(path), "second_model": second})
    assert config.vicreg.second_encoder.model_type == "resnet"


@pytest.mark.parametrize(
    ("given", "views", "encoder"),
    [
        ({"views": {"image_size": 64}}, (64, 64), 64),
        ({"views": {"image_size": [48, 64]}}, (48, 64), (48, 64)),
        ({"config": "cifar10_cpu", "views": {"image_size": 64}}, (64, 64), 64),
        ({"model": {"image_size": 64}}, (64, 64), 64),
        ({"views": {"image_size": 64}, "model": {"image_size": 64}}, (64, 64), 64),
        ({"views": {"image_size": 64}, "model": {"model_type": "resnet"}}, (64, 64), None),
    ],
    ids=["views", "pair", "recipe", "model", "both", "resnet"],
)
def test_size_of_the_views_is_the_encoders(given, views, encoder):
    config = resolve(NEEDED | given)
    assert config.image_size == views
    found = getattr(config.vicreg.encoder, "image_size", None)
    assert (tuple(found) if isinstance(found, list) else found) == encoder


def test_a_bigbird_vit_is_used_at_a_size_of_its_own():
    config = resolve(NEEDED | {"views": {"image_size": 24}, "model": {"image_size": [40, 48], "patch_size": 8}})
    assert config.image_size == (24, 24)
    assert config.used_image_size == (40, 48)
    again = resolve(NEEDED | config.to_recipe())
    assert (again.image_size, again.used_image_size) == ((24, 24), (40, 48))


def test_one_of_two_sizes_given_above_a_recipe_is_both(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"views": {"image_size": 24}, "model": {"image_size": 40, "patch_size": 8}}))
    for above in ({"views": {"image_size": 32}}, {"model": {"image_size": 32}}):
        config = resolve(NEEDED | {"config": str(recipe)} | above)
        assert (config.image_size, config.used_image_size) == ((32, 32), (32, 32))


def test_two_sizes_beside_a_second_encoder_are_refused():
    given = {
        "views": {"image_size": 24},
        "model": {"image_size": 32, "patch_size": 8},
        "second_model": {"model_type": "vit"},
    }
    with pytest.raises(InputError, match=r"`model.image_size`: expected that of the second encoder, \(24, 24\)"):
        resolve(NEEDED | given)


def test_two_sizes_of_another_encoder_are_refused():
    vit = {"model_type": "vit", "image_size": 32}
    with pytest.raises(InputError, match=r"`views.image_size`: expected `model.image_size`, 32"):
        resolve(NEEDED | {"views": {"image_size": 64}, "model": vit})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("90s", 90), ("15m", 900), ("2h", 7200), ("1d", 86400), ("1h30m", 5400), ("2H", 7200)],
        *[("2 minutes", 120), ("2min", 120), ("90 sec", 90), ("1hour", 3600), ("1 day", 86400), ("1 h 30 min", 5400)],
    ],
)
def test_times_in_words(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("512m", 512 * 2**20), ("4g", 4 * 2**30), ("1.5g", 3 * 2**29), ("4GB", 4 * 2**30)]
)
def test_sizes_in_words(text, size):
    assert bytes_of(text) == size


def test_a_time_in_two_words_is_refused_with_how_it_is_written():
    with pytest.raises(InputError, match=r"^`time_budget`: expected one word, 2m, got 2 minutes\.$"):
        parse_flags(["images", "--time_budget", "2", "minutes"])
    assert parse_flags(["--time_budget", "2m", "minutes"])["data"] == "minutes", "a folder of that name"


@pytest.mark.parametrize("text", ["", "0m", "15", "-2h", "1h2d", "soon", "1.5h", "2 months", "1 30m"])
def test_times_that_are_none_are_named(text):
    with pytest.raises(InputError, match="`time_budget`: expected a time like 90s"):
        seconds_of(text)


@pytest.mark.parametrize("text", ["", "0g", "4", "-4g", "4x", "much"])
def test_sizes_that_are_none_are_named(text):
    with pytest.raises(InputError, match="`max_memory`: expected memory like"):
        bytes_of(text)


def test_explicit_settings_are_what_was_chosen():
    settings = explicit_settings({"config": "cifar10_cpu", "dataset_name": "digits", "model": {"tile_size": 4}})
    assert settings["learning_rate"] == 3e-3  # the recipe's
    assert settings["model"]["tile_size"] == 4
    assert settings["model"]["hidden_size"] == 128
    assert "weight_decay" not in settings
    assert "output_dir" not in settings
    assert explicit_settings(settings) == settings


def test_a_flag_alone_is_not_held_against_a_default_that_may_yet_be_fitted():
    chosen = {"dataset_name": "digits", "statistics_batch_size": 100}
    assert explicit_settings(chosen)["statistics_batch_size"] == 100
    with pytest.raises(InputError, match="`statistics_batch_size`: expected a multiple"):
        explicit_settings(chosen | {"batch_size": 64})


def test_another_source_leaves_nothing_of_the_recipes_normalisation(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: one\nviews: {image_mean: 0.4, image_std: 0.2, channel_low: 3.0, channel_high: 900.0}\n"
    )
    given = {"config": str(recipe), "dataset_name": "digits", "output_dir": "x"}
    assert "views" not in explicit_settings(given | {"model_name_or_path": "other"})
    assert len(explicit_settings(given | {"model_name_or_path": "one"})["views"]) == 4
