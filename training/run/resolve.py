"""From a run's settings and the defaults to its configuration; unknown keys and wrong types fail."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
from hf_vicreg.modeling.configuration_vicreg import VicRegConfig, encoder_config
from hf_vicreg.modeling.objectives import check_views, complete_settings
from hf_vicreg.training.errors import InputError, as_input_error, hint
from hf_vicreg.training.objectives.combined import WEIGHTS
from hf_vicreg.training.objectives.registry import OBJECTIVE_SECTIONS
from hf_vicreg.training.run.arguments import RESERVED, SECTIONS, PretrainArguments, ViewsConfig
from hf_vicreg.training.run.checks import MAX_CHANNELS, check_channels, check_local_views, check_ranges
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.run.settings import explicit_settings


def resolve(given: dict[str, Any]) -> RunConfig:
    """Return the run's configuration from its settings: what they leave open is at its default.

    Args:
        given: Nested dictionary of settings, of `explicit_settings` or what it takes.

    Raises:
        InputError: An unknown key or a value of the wrong type or range, in the recipe or among the settings.
    """
    settings = explicit_settings(given)
    sections = {section: settings.pop(section, {}) for section in SECTIONS}
    run = PretrainArguments(**settings)
    check_ranges(run)
    if not run.output_dir:
        raise InputError("`output_dir`: expected a folder for the run, got none; add --output_dir FOLDER.")
    views = ViewsConfig(**sections["views"])
    encoder = _encoder(sections["model"], "model", views)
    second = _encoder(sections["second_model"], "second_model", views) if sections["second_model"] else None
    sizes = [_pair(getattr(one, "image_size", None)) for one in (encoder, second)]
    if views.image_size is not None and None not in sizes and sizes[0] != sizes[1]:
        raise InputError(
            f"`model.image_size`: expected that of the second encoder, {sizes[1]}, got {sizes[0]}: both have one "
            "image processor; give `views.image_size` alone."
        )
    with as_input_error("vicreg"):
        _check_keys(sections["vicreg"], VicRegConfig(), "vicreg")
        vicreg = VicRegConfig(encoder=encoder, second_encoder=second, **sections["vicreg"])
    if run.objective != "vicreg":
        with as_input_error(run.objective):
            vicreg = VicRegConfig(
                encoder=encoder,
                second_encoder=second,
                objective=run.objective,
                objective_settings=complete_settings(run.objective, _objective_settings(run.objective, sections)),
                **sections["vicreg"],
            )
    config = RunConfig(run=run, views=views, vicreg=vicreg)
    with as_input_error(run.objective):
        check_views(vicreg, config.image_size)
    if views.num_local_views:
        with as_input_error("views.local_image_size"):
            check_views(vicreg, (views.local_image_size, views.local_image_size))
    check_local_views(config)
    check_channels(config)
    return config


def _objective_settings(objective: str, sections: dict[str, Any]) -> dict[str, Any]:
    """The settings of an objective, of several with their weights, as a `VicRegConfig` has them."""
    if "+" not in objective:
        return sections.get(objective, {})
    given = {name: sections[name] for name in objective.split("+") if name in OBJECTIVE_SECTIONS and sections[name]}
    return given | {"weights": sections[WEIGHTS]}


def _encoder(settings: dict[str, Any], section: str, views: ViewsConfig) -> PreTrainedConfig:
    """Return an encoder's configuration from its section of the settings; its image size is the views' unless given.

    Raises:
        InputError: An unknown key or model type, or fields that make no encoder of RGB images of the views' size.
    """
    with as_input_error(section):
        encoder = encoder_config({})
        model_type = settings.get("model_type", encoder.model_type)
        if model_type != encoder.model_type and model_type not in CONFIG_MAPPING:
            raise InputError(
                f"`{section}.model_type`: expected a model type transformers knows, got {model_type!r}"
                f"{hint(model_type, list(CONFIG_MAPPING))}"
            )
        if model_type != encoder.model_type:
            encoder = encoder_config({"model_type": model_type})
        _check_keys(settings, encoder, section)
        if views.image_size is not None and hasattr(encoder, "image_size"):
            settings = {"image_size": views.image_size} | settings
        encoder = encoder_config(settings)
        own, wanted = (_pair(size) for size in (getattr(encoder, "image_size", None), views.image_size))
        if None not in (own, wanted) and own != wanted and not isinstance(encoder, BigBirdViTConfig):
            raise InputError(
                f"`views.image_size`: expected `{section}.image_size`, {encoder.image_size}, or one of the two alone, "
                f"got {views.image_size}; two sizes need a `bigbird_vit`."
            )
        if wanted is not None and isinstance(encoder, BigBirdViTConfig):
            patch = encoder.patch_size_hw
            if any(side < least for side, least in zip(wanted, patch, strict=True)):
                raise InputError(
                    f"`views.image_size`: expected at least one patch of {patch}, got {views.image_size}; "
                    f"choose larger views or a smaller `{section}.patch_size`."
                )
        channels = getattr(encoder, "num_channels", 3)
        if not 1 <= channels <= MAX_CHANNELS:
            raise InputError(f"`{section}.num_channels`: expected 1 to {MAX_CHANNELS}, got {channels}.")
    return encoder


def _pair(size: Any) -> tuple[int, ...] | None:
    return (size, size) if isinstance(size, int) else None if size is None else tuple(size)


def _check_keys(settings: dict[str, Any], config: PreTrainedConfig, section: str) -> None:
    known = [name for name in config.to_dict() if not name.startswith("_") and name not in RESERVED]
    for key in settings:
        if key not in known and key != "model_type":
            raise InputError(f"`{section}.{key}`: unknown key{hint(key, known)}")
