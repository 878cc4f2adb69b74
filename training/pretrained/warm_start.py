"""Warm starts: a run's encoder begins with the weights of a vision encoder that is there already.

`with_source` makes the source's architecture and normalisation settings of the run, before anything is planned.
`take_source_weights` gives the weights to the model, before the first step. A resumed run has all of it in its recipe
and its checkpoint, and reads no source.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining, build_encoder
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import public_name
from hf_vicreg.training.pretrained.source_encoder import (
    FIELD,
    channels_of,
    image_size_of,
    inflated_weights,
    load_source,
    normalisation_of,
    resampled_table,
    trained_image_size,
)
from hf_vicreg.training.run.arguments import OPEN_FIELDS, RESERVED
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.run.run_folder import RECIPE
from hf_vicreg.training.run.section_flags import INHERITED
from hf_vicreg.training.run.settings import DEFAULT_MODEL_TYPE, NORMALISATION, read_recipe, same_source

logger = logging.getLogger("hf_vicreg.training.pretrain")  # one voice for the whole command


def with_source(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings with the architecture, the image size and the normalisation of `model_name_or_path`.

    Where the run is resumed they are those of its recipe. Of the architecture, `OPEN_FIELDS` may be given beside it.

    Raises:
        InputError: No vision encoder there, one that lacks tensors, that cannot be made sparse or whose images are not
            RGB normalised by mean and deviation; or a field that its weights decide, given otherwise.
    """
    for key in ("teacher", "teacher_features"):
        if settings.get(key) and os.path.isdir(settings[key]):
            settings = settings | {key: os.path.abspath(settings[key])}
    name = settings.get(FIELD)
    if not name:
        return settings
    stored = Path(settings["output_dir"]) / RECIPE
    if settings.get("resume_from_checkpoint") is not None and stored.is_file():
        return _as_stored(settings, read_recipe(str(stored)))
    encoder, missing = load_source(name, sparse=bool(settings.get("sparse")))
    given, views = settings.get("model", {}), settings.get("views", {})
    fields = architecture(encoder.config)
    for key, value in given.items():
        if key not in OPEN_FIELDS and key in fields and _plain(value) != _plain(fields[key]):
            raise InputError(f"`model.{key}`: expected {fields[key]!r} as in `{FIELD}`, got {value!r}; leave it out.")
    fields |= given
    if "image_size" in fields:
        of_ours = not settings.get("sparse")  # else it became a BigBirdViT just now
        views, fields["image_size"] = _sizes(name, encoder.config, given.get("image_size"), views, of_ours)
    views = _normalisation(name, encoder.config, settings, fields) | views
    where = os.path.abspath(name) if os.path.isdir(name) else name  # a Hub id and a relative path look alike
    settings = settings | {FIELD: where, "model": fields, "views": views}
    config = resolve(settings)
    _fit(encoder, missing, _build(config), config.used_image_size)
    return settings


def take_source_weights(model: VicRegForPreTraining, config: RunConfig) -> None:
    """Give the run's encoder the weights of `model_name_or_path`, positions resampled to its image size, and say so.

    Raises:
        InputError: No such source any more, or one that takes no images of that size.
    """
    name = config.run.model_name_or_path
    assert name is not None
    source, missing = load_source(name, sparse=config.run.sparse)
    resampled = _fit(source, missing, model.encoder, config.used_image_size)
    logger.info("the encoder begins with the weights of %s, a %s", public_name(name), source.config.model_type)
    if any("pooler" in one for one in missing):
        logger.warning("%s has no weights for its pooler, which begins at random", public_name(name))
    size, own = image_size_of(model.encoder.config), image_size_of(source.config)
    if size != own:
        how = f"positions are resampled: {', '.join(resampled)}" if resampled else "no table of positions to resample"
        logger.info("images are of %s pixels, the source's of %s; %s", size, own, how)


def _sizes(
    name: str, config: PreTrainedConfig, given: Any, views: dict[str, Any], of_ours: bool
) -> tuple[dict[str, Any], Any]:
    """Return the views, with their size where it is not the encoder's, and the encoder's image size."""
    asked, own = views.get("image_size"), image_size_of(config)
    if given is None and asked is None:
        trained = trained_image_size(name, config, FIELD) if of_ours else own
        if trained != own:
            logger.info("views of %s pixels, images of %s in use, as %s has them", trained, own, public_name(name))
            views = views | {"image_size": _plain(trained)}
        return views, config.image_size
    if asked is None or given is None:
        return views, given if asked is None else asked
    if _plain(given) != _plain(asked) and config.model_type != DEFAULT_MODEL_TYPE:
        logger.warning("`model.image_size` %s is left out: only a %s has two sizes", given, DEFAULT_MODEL_TYPE)
        given = asked
    return views, given


def _build(config: RunConfig) -> PreTrainedModel:
    encoder = config.vicreg.encoder
    try:
        return build_encoder(encoder)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_such_size(encoder, config.image_size, error) from error


def _no_such_size(encoder: PreTrainedConfig, size: tuple[int, int], error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"`views.image_size`: expected a size that an encoder of type {encoder.model_type!r} takes, got {size}: "
        f"{type(error).__name__}: {reason}"
    )


@torch.no_grad()
def _fit(source: PreTrainedModel, missing: set[str], encoder: PreTrainedModel, size: tuple[int, int]) -> list[str]:
    """Give an encoder a source's weights, and return the names of the tables that are resampled to an image size.

    Raises:
        InputError: A tensor depends on the image size and cannot be resampled, or no image of that size is taken.
    """
    weights = {key: one for key, one in source.state_dict().items() if key not in missing}
    resampled = []
    for key, wanted in encoder.state_dict().items():
        if key not in weights or weights[key].shape == wanted.shape:
            continue
        inflated = inflated_weights(weights[key], wanted)
        if inflated is not None:
            weights[key] = inflated
            continue
        table = resampled_table(source, key, wanted, size)
        if table is None or table.numel() != wanted.numel():
            raise InputError(
                f"`views.image_size`: expected {image_size_of(source.config)} pixels as in `{FIELD}`, whose tensor "
                f"{key!r} {tuple(weights[key].shape)} cannot be resampled, got {size}."
            )
        weights[key] = table.reshape(wanted.shape)
        resampled.append(key)
    found = encoder.load_state_dict(weights, strict=False)
    assert set(found.missing_keys) <= missing
    try:
        encoder.eval()(pixel_values=torch.zeros(1, getattr(encoder.config, "num_channels", 3), *size))
    except (RuntimeError, ValueError, TypeError) as error:
        raise _no_such_size(encoder.config, size, error) from error
    return resampled


def _normalisation(
    name: str, config: PreTrainedConfig, settings: dict[str, Any], fields: dict[str, Any]
) -> dict[str, Any]:
    """Return the views' normalisation of a source: of RGB, or of its own channels; none where it is to be measured."""
    own, wanted = (one.get("num_channels", 3) for one in (config.to_dict(), fields))
    if own != wanted or settings.get("normalisation") not in (None, ["photo"]):
        return {}
    if own != 3:
        return channels_of(name, config) or {}
    return channels_of(name, config) or dict(
        zip(("image_mean", "image_std"), normalisation_of(name, config), strict=True)
    )


def _as_stored(settings: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a resumed run, with what its recipe holds of the source."""
    stored = recipe.get(FIELD)
    name = stored if same_source(settings[FIELD], stored) else settings[FIELD]
    kept = (*NORMALISATION, "image_size")
    views = {key: one for key, one in (recipe.get("views") or {}).items() if key in kept and one is not None}
    model = {"model_type": DEFAULT_MODEL_TYPE} | (recipe.get("model") or {}) | settings.get("model", {})
    return settings | {FIELD: name, "model": model, "views": views | settings.get("views", {})}


def architecture(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that build such an encoder; a file may hold others, of other releases or of a task."""
    known = type(config)().to_dict().keys() - RESERVED - INHERITED
    fields = {key: one for key, one in config.to_dict().items() if key in known and not key.startswith("_")}
    return fields | {"model_type": config.model_type}


def _plain(value: Any) -> Any:
    """A pair of equal numbers as one, lists as tuples, so that 16 and [16, 16] are the same."""
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 2 and value[0] == value[1] else tuple(value)
    return value
