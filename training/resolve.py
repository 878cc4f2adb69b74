"""From flags, recipe and defaults to a run's configuration; unknown keys and wrong types fail."""

import argparse
import dataclasses
import difflib
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import CONFIG_MAPPING, HfArgumentParser, PreTrainedConfig

from hf_vicreg.modeling.configuration_vicreg import VicRegConfig, encoder_config
from hf_vicreg.training.checks import check_local_views, check_ranges
from hf_vicreg.training.config import RESERVED, SECTIONS, VIEW_PRESETS, PretrainArguments, RunConfig, ViewsConfig
from hf_vicreg.training.errors import InputError, as_input_error


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("hf_vicreg.training") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Return a recipe's dictionary.

    Args:
        name_or_path: The name of a recipe of the package, or a YAML file.

    Raises:
        InputError: No such recipe, or not a YAML mapping.
    """
    path = Path(name_or_path)
    if name_or_path in recipe_names():
        text = (resources.files("hf_vicreg.training") / "recipes" / f"{name_or_path}.yaml").read_text()
    elif path.is_file():
        try:
            text = path.read_text()
        except UnicodeDecodeError as error:
            raise InputError(f"`config`: expected a YAML file, {name_or_path} is not text.") from error
    else:
        raise InputError(f"`config`: expected a YAML file or one of {recipe_names()}, got {name_or_path!r}.")
    try:
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a bare ValueError
        raise InputError(f"`config`: {name_or_path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"`config`: expected a mapping of keys in {name_or_path}, got {type(recipe).__name__}.")
    return recipe


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help.")  # one line, without the usage text


def parse_flags(arguments: list[str]) -> dict[str, Any]:
    """Return the explicit flags of a command line as a nested dictionary, `config` among them if given.

    Raises:
        InputError: An unknown flag, or a dotted flag without a value.
    """
    parser = _Parser(
        [PretrainArguments],
        prog="hf_vicreg.training.pretrain",
        description="Pretrain an encoder by VICReg. Sections of a recipe have dotted flags: --model.KEY and "
        "--second_model.KEY (encoders), --vicreg.KEY (expander and loss), --views.KEY (augmentation); for example "
        "--model.tile_size 4.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help=f"Recipe: a YAML file or one of {', '.join(recipe_names())}.")
    for action in parser._actions:  # only what was typed counts: defaults come after the recipe
        action.default = argparse.SUPPRESS
    known, rest = parser.parse_known_args(arguments)
    given = vars(known)
    while rest:
        flag, separator, value = rest.pop(0).partition("=")
        section, dot, key = flag.removeprefix("--").partition(".")
        if not (flag.startswith("--") and dot and section in SECTIONS):
            names = [f"--{one.name}" for one in dataclasses.fields(PretrainArguments)]
            raise InputError(f"`{flag}`: unknown flag{_hint(flag, names)}; see --help.")
        if not separator:
            if not rest:
                raise InputError(f"`{flag}`: expected a value, got none.")
            value = rest.pop(0)
        try:
            given.setdefault(section, {})[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise InputError(f"`{flag}`: expected a YAML value, got {value!r}.") from error
    return given


def resolve(given: dict[str, Any]) -> RunConfig:
    """Return the run's configuration from explicit settings and, if `config` is among them, a recipe below them.

    Args:
        given: Nested dictionary of settings; `config` names a recipe.

    Raises:
        InputError: An unknown key or a value of the wrong type or range, in the recipe or among the settings.
    """
    given = {key: value for key, value in given.items() if value is not None}
    name = given.pop("config", None)
    recipe = read_recipe(str(name)) if name is not None else {}
    if given.keys() & {"dataset_name", "train_dir"}:  # the recipe's data gives way, whichever of the two names it
        recipe = {key: value for key, value in recipe.items() if key not in ("dataset_name", "train_dir")}
    merged: dict[str, Any] = {}
    for origin, settings in ((f"recipe {name}", recipe), ("arguments", given)):
        for key, value in settings.items():
            known = [one.name for one in dataclasses.fields(PretrainArguments)]
            if key not in known and key not in SECTIONS:
                raise InputError(f"`{key}`: unknown key in {origin}{_hint(key, [*known, *SECTIONS])}.")
            if key in SECTIONS:
                if isinstance(value, PreTrainedConfig):
                    fields = {name: one for name, one in value.to_diff_dict().items() if name not in RESERVED}
                    value = fields | {"model_type": value.model_type}
                if not isinstance(value, dict):
                    raise InputError(f"`{key}`: expected a mapping in {origin}, got {value!r}.")
                merged.setdefault(key, {}).update(_expand_preset(value) if key == "views" else value)
            else:
                merged[key] = value
    sections = {section: merged.pop(section, {}) for section in SECTIONS}
    run = PretrainArguments(**_typed(PretrainArguments, merged, ""))
    views = ViewsConfig(**_typed(ViewsConfig, sections["views"], "views."))
    encoder = _encoder(sections["model"], "model")
    second = _encoder(sections["second_model"], "second_model") if sections["second_model"] else None
    with as_input_error("vicreg"):
        _check_keys(sections["vicreg"], VicRegConfig(), "vicreg")
        vicreg = VicRegConfig(encoder=encoder, second_encoder=second, **sections["vicreg"])
    check_ranges(run)
    config = RunConfig(run=run, views=views, vicreg=vicreg)
    check_local_views(config)
    return config


def _encoder(settings: dict[str, Any], section: str) -> PreTrainedConfig:
    """Return an encoder's configuration from its section of the settings."""
    with as_input_error(section):
        encoder = encoder_config({})
        model_type = settings.get("model_type", encoder.model_type)
        if model_type != encoder.model_type and model_type not in CONFIG_MAPPING:
            raise InputError(
                f"`{section}.model_type`: expected a model type transformers knows, got {model_type!r}"
                f"{_hint(model_type, list(CONFIG_MAPPING))}."
            )
        if model_type != encoder.model_type:
            encoder = encoder_config({"model_type": model_type})
        _check_keys(settings, encoder, section)
        encoder = encoder_config(settings)
        if getattr(encoder, "num_channels", 3) != 3:
            raise InputError(
                f"`{section}.num_channels`: expected 3, images are read as RGB, got {encoder.num_channels}."
            )
    return encoder


def _expand_preset(views: dict[str, Any]) -> dict[str, Any]:
    """Return a layer's settings of the views with its preset spelled out; settings beside the preset win over it."""
    views = dict(views)
    name = views.pop("preset", None)
    if name is not None and name not in VIEW_PRESETS:
        raise InputError(f"`views.preset`: expected one of {sorted(VIEW_PRESETS)}, got {name!r}.")
    return VIEW_PRESETS.get(name, {}) | views


def _check_keys(settings: dict[str, Any], config: PreTrainedConfig, section: str) -> None:
    known = [name for name in config.to_dict() if not name.startswith("_") and name not in RESERVED]
    for key in settings:
        if key not in known and key != "model_type":
            raise InputError(f"`{section}.{key}`: unknown key{_hint(key, known)}.")


def _typed(kind: type, settings: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Check and convert plain values to the types of a dataclass's fields; YAML reads 1e-3 as a string, for one."""
    hints = typing.get_type_hints(kind)
    typed: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in hints:
            raise InputError(f"`{prefix}{key}`: unknown key{_hint(key, list(hints))}.")
        accepted = typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
        expected = next(one for one in accepted if one is not type(None))
        if isinstance(value, list | tuple) and tuple[float, float] in accepted:
            if len(value) != 2:
                raise InputError(f"`{prefix}{key}`: expected a number, or two for the two views, got {value}.")
            typed[key] = tuple(_typed(kind, {key: one}, prefix)[key] for one in value)
            continue
        try:
            if value is None and type(None) in accepted:
                typed[key] = None
            elif expected is str:
                typed[key] = "no" if value is False else str(value)  # YAML reads a bare `no` as false
            elif isinstance(value, bool) != (expected is bool) or value is None:
                raise ValueError
            else:
                typed[key] = expected(value)
                if typed[key] != float(value):
                    raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"`{prefix}{key}`: expected {expected.__name__}, got {value!r}.") from error
    return typed


def _hint(key: object, known: list[str]) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""
