"""From flags and a recipe to a run's explicit settings: merged, typed and checked. Imports nothing heavy."""

import dataclasses
import logging
import os
import types
import typing
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hf_vicreg.training.errors import InputError, hint
from hf_vicreg.training.objectives.combined import WEIGHTS
from hf_vicreg.training.objectives.registry import ENTRIES, entries_of, entry_named, refused_objective
from hf_vicreg.training.run.arguments import (
    OPEN_FIELDS,
    RESERVED,
    SECTIONS,
    PretrainArguments,
    ViewsConfig,
)
from hf_vicreg.training.run.checks import check_ranges
from hf_vicreg.training.run.places import data_setting, is_shards
from hf_vicreg.training.run.run_folder import begun_sizes
from hf_vicreg.training.run.section_flags import INHERITED, MODEL, VICREG, VICREG_WEIGHTS
from hf_vicreg.training.run.view_presets import VIEW_PRESETS

logger = logging.getLogger(__name__)

DEFAULT_MODEL_TYPE = "bigbird_vit"
# how values of channels become what an encoder takes, among the views
NORMALISATION = ("image_mean", "image_std", "channel_low", "channel_high")


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


def explicit_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that somebody chose, in a recipe or above it; what stands at its default is not among them.

    Args:
        given: Nested dictionary of settings; `config` names a recipe that goes below them, `data` stands for
            `train_dir` or `dataset_name`, as it is a folder of images or not.

    Raises:
        InputError: An unknown key or a value of the wrong type or range. Left to `resolve`, which knows the classes,
            are the values of `model`, `second_model` and `vicreg`, and the keys of encoders that are no BigBirdViT.
    """
    given = {key: value for key, value in given.items() if value is not None}
    name, data = given.pop("config", None), given.pop("data", None)
    if data is not None and is_shards(str(data)) and not given.keys() & {"dataset_name", "train_dir"}:
        given = {"dataset_name": str(data), "streaming": True} | given
    elif data is not None:
        given = data_setting(str(data), given, held_out=True) | given
    recipe = read_recipe(str(name)) if name is not None else {}
    if given.keys() & {"dataset_name", "train_dir"}:  # the recipe's data gives way, whichever of the two names it
        recipe = {key: value for key, value in recipe.items() if key not in ("dataset_name", "train_dir")}
    below = _checked_keys(recipe, f"recipe {name}")
    above = _checked_keys(given, "arguments")
    _refuse_architecture(above)
    _give_way(below, above)
    merged = below | above
    for section in SECTIONS:
        if section in merged:
            merged[section] = below.get(section, {}) | above.get(section, {})
        of_source = section == "model" and merged.get("model_name_or_path")  # whose fields are not known here
        if section in ("model", "second_model", "vicreg") and not of_source:
            _refuse_unknown(merged.get(section, {}), section)
    _check_objective(merged)
    views = typed(ViewsConfig, merged.get("views", {}), "views.")
    run = typed(PretrainArguments, {key: value for key, value in merged.items() if key not in SECTIONS}, "")
    ViewsConfig(**views)
    check_ranges(PretrainArguments(**run), given=run.keys())
    sections = {key: merged[key] for key in SECTIONS if merged.get(key)}
    return run | sections | ({"views": views} if views else {})


def _checked_keys(settings: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return a layer of settings with its sections as dictionaries and the preset of its views spelled out."""
    known = [*(one.name for one in dataclasses.fields(PretrainArguments)), *SECTIONS]
    checked = {}
    for key, value in settings.items():
        if key not in known:
            raise InputError(f"`{key}`: unknown key in {origin}{hint(key, known)}")
        if key in SECTIONS:
            if hasattr(value, "to_diff_dict"):  # a configuration of transformers
                fields = {name: one for name, one in value.to_diff_dict().items() if name not in RESERVED}
                value = fields | {"model_type": value.model_type}
            if not isinstance(value, dict):
                raise InputError(f"`{key}`: expected a mapping in {origin}, got {value!r}.")
            value = _expand_preset(value) if key == "views" else dict(value)
        checked[key] = value
    return checked


def _refuse_unknown(settings: dict[str, Any], section: str) -> None:
    """Raise InputError for a key that no BigBirdViT, or no loss, has; other encoders are not known here."""
    if section != "vicreg" and settings.get("model_type", DEFAULT_MODEL_TYPE) != DEFAULT_MODEL_TYPE:
        return
    known = VICREG if section == "vicreg" else MODEL
    for key in settings:
        if key not in known and key not in INHERITED:
            raise InputError(f"`{section}.{key}`: unknown key{hint(key, list(known))}")


def _check_objective(settings: dict[str, Any]) -> None:
    """Raise InputError for no such objective, settings of others, unknown keys or a model it cannot train."""
    name = settings.get("objective", "vicreg")
    entry = entry_named(name)
    if entry is None:
        raise InputError(refused_objective("objective", name))
    for one in entries_of(name):
        for key in settings.get(one.name, {}) if one.settings else ():
            if key not in one.settings:
                raise InputError(f"`{one.name}.{key}`: unknown key{hint(key, list(one.settings))}")
    foreign = next(_of_other_objectives(settings, name), None)
    if foreign is not None:
        raise InputError(
            f"`{foreign}`: expected no setting of another objective than {name!r}; leave it out, or choose its own."
        )
    if entry.one_encoder and settings.get("second_model"):
        raise InputError(f"`second_model`: expected none with objective {name!r}: {entry.one_encoder}; leave it out.")
    for key in ("teacher", "teacher_features", "torch_compile") if entry.encodes else ():
        if settings.get(key):
            raise InputError(
                f"`{key}`: expected none with objective {name!r}, whose encoder gets other masks in every step, got "
                f"{settings[key]!r}; leave it out."
            )


def _of_other_objectives(settings: dict[str, Any], name: str) -> Iterator[str]:
    """Yield the settings that are of another objective than the one of a name."""
    own = entries_of(name)
    for other, entry in ENTRIES.items():
        if entry.settings and entry not in own:
            yield from (f"{other}.{key}" for key in settings.get(other, {}))
    weighed = [entry.name for entry in own] if len(own) > 1 else []
    yield from (f"{WEIGHTS}.{key}" for key in settings.get(WEIGHTS, {}) if key not in weighed)
    if not any(entry.vicreg_weights for entry in own):
        yield from (f"vicreg.{key}" for key in settings.get("vicreg", {}) if key in VICREG_WEIGHTS)


def _refuse_architecture(above: dict[str, Any]) -> None:
    """Raise InputError for an architecture chosen beside weights, which decide it.

    With a `model_type` the section is a whole configuration, held against the source's when that is read.
    """
    section, source = above.get("model", {}), above.get("model_name_or_path")
    if source is None or "model_type" in section:
        return
    for key, value in section.items():
        if key not in OPEN_FIELDS:
            raise InputError(
                f"`model.{key}`: expected none beside `model_name_or_path`, whose weights decide it, got {value!r}; "
                "leave one of the two out."
            )


def same_source(one: str | None, other: str | None) -> bool:
    """Return whether two values of `model_name_or_path` name the same: a run stores where a folder lies."""
    return one == other or (None not in (one, other) and os.path.abspath(str(one)) == os.path.abspath(str(other)))


def _give_way(below: dict[str, Any], above: dict[str, Any]) -> None:
    """Drop from a recipe, in place, what has no meaning beside the settings above it; dropped fields are logged."""
    name = above.get("objective")
    if name is not None and entries_of(name):  # a recipe may have sections for several
        dropped = list(_of_other_objectives(below, name))
        for section, _, key in (one.partition(".") for one in dropped):
            below[section] = {other: value for other, value in below[section].items() if other != key}
        if dropped:
            logger.info("the recipe's %s are left out for %s", ", ".join(f"`{one}`" for one in dropped), name)
    timed, lengths = above.get("time_budget") is not None, ("num_train_epochs", "max_steps")
    # the length is what the time holds; a recipe's own time has decided on its length already
    for key in lengths if timed else ("time_budget",) if below.keys() & lengths else ():
        below.pop(key, None)
    views, views_above = below.setdefault("views", {}), above.get("views", {})
    sized_above = views_above.get("image_size") is not None
    source = above.get("model_name_or_path")
    if source is not None and not same_source(source, below.get("model_name_or_path")):
        fields = below.pop("model", {})
        for key in NORMALISATION:  # of the recipe's own source
            views.pop(key, None)
        size = fields.get("image_size")
        own = size is not None and "image_size" not in above.get("model", {})
        if own and views.setdefault("image_size", size) != size and not sized_above:
            below["model"] = {"image_size": fields.pop("image_size")}  # used at another size than it is trained on
        if fields:
            logger.info("the recipe's %s are left out for those of %s", _named("model", list(fields)), source)
    for section in ("model", "second_model"):
        fields, asked = below.get(section, {}), above.get(section, {})
        found = fields.get("model_type", DEFAULT_MODEL_TYPE)
        wanted = asked.get("model_type", found)
        if fields and wanted != found:
            dropped = [key for key in fields if key != "model_type" and key not in asked]
            size = fields.get("image_size")
            if section == "model" and size is not None and "image_size" not in asked:
                views.setdefault("image_size", size)
            below[section] = {}
            if dropped:
                logger.info(
                    "the recipe's %s are a %s's, and left out for a %s", _named(section, dropped), found, wanted
                )
        elif sized_above and "image_size" not in asked:
            fields.pop("image_size", None)  # the size asked for is that of the views, and so the encoder's
    used_above = above.get("model", {}).get("image_size") is not None
    resuming = above.get("resume_from_checkpoint") is not None
    begun = begun_sizes(Path(above.get("output_dir") or below.get("output_dir") or "")) if resuming else {}
    if used_above != sized_above and begun:  # of a run that goes on, the size that is not given stays
        below.setdefault("views", {}).update(image_size=begun["views"])
        if "model" in begun:
            below.setdefault("model", {}).update(image_size=begun["model"])
    elif used_above and not sized_above:
        views.pop("image_size", None)


def _named(section: str, keys: list[str]) -> str:
    return ", ".join(f"`{section}.{key}`" for key in keys)


def _expand_preset(views: dict[str, Any]) -> dict[str, Any]:
    """Return a layer's settings of the views with its preset spelled out; settings beside the preset win over it."""
    views = dict(views)
    name = views.pop("preset", None)
    if name is not None and name not in VIEW_PRESETS:
        raise InputError(f"`views.preset`: expected one of {sorted(VIEW_PRESETS)}, got {name!r}.")
    return VIEW_PRESETS.get(name, {}) | views


def typed(kind: type, settings: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Check and convert plain values to the types of a dataclass's fields; YAML reads 1e-3 as a string, for one.

    Raises:
        InputError: An unknown key, or a value of another type.
    """
    hints = typing.get_type_hints(kind)
    checked: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in hints:
            raise InputError(f"`{prefix}{key}`: unknown key{hint(key, list(hints))}")
        accepted = typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
        expected = next(one for one in accepted if one is not type(None))
        if isinstance(value, list | tuple) and any(typing.get_origin(one) is tuple for one in accepted):
            wanted = next(len(typing.get_args(one)) for one in accepted if typing.get_origin(one) is tuple)
            each = any(Ellipsis in typing.get_args(one) for one in accepted)  # one for each channel
            if len(value) != wanted and not each:
                several = "two for the two views" if expected is float else "two, height and width"
                raise InputError(f"`{prefix}{key}`: expected a number, or {several}, got {value}.")
            checked[key] = tuple(typed(kind, {key: one}, prefix)[key] for one in value)
            continue
        try:
            if value is None and type(None) in accepted:
                checked[key] = None
            elif typing.get_origin(expected) is list:
                checked[key] = [str(one) for one in (value if isinstance(value, list | tuple) else [value])]
            elif expected is str:
                checked[key] = "no" if value is False else str(value)  # YAML reads a bare `no` as false
            elif isinstance(value, bool) != (expected is bool) or value is None:
                raise ValueError
            else:
                checked[key] = expected(value)
                if checked[key] != float(value):
                    raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"`{prefix}{key}`: expected {expected.__name__}, got {value!r}.") from error
    return checked
