"""A vision encoder in a folder or on the Hub, its normalisation and its positions."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from hf_vicreg.model_cards.shipped import located
from hf_vicreg.modeling.bigbird_positions import resampled_positions
from hf_vicreg.modeling.dense_weights import SOURCES
from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTEmbeddings, BigBirdViTModel
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining, pooled_features, representation_size
from hf_vicreg.modeling.modeling_vicreg_dual_encoder import VicRegDualEncoder
from hf_vicreg.training.errors import InputError, blamed_on
from hf_vicreg.training.evaluation.encoder import (
    load_config,
    load_processor,
    load_weights,
    no_model,
    quiet_transformers,
)
from hf_vicreg.training.run.run_folder import RECIPE
from hf_vicreg.training.run.settings import read_recipe

logger = logging.getLogger("hf_vicreg.training.pretrain")  # one voice for the whole command

FIELD = "model_name_or_path"
PARTS: dict[str, tuple[Any, str]] = {
    VicRegForPreTraining.config_class.model_type: (VicRegForPreTraining, "encoder"),
    VicRegDualEncoder.config_class.model_type: (VicRegDualEncoder, "vision_model"),
}
COLOUR = (50, 120, 200)  # of an image that shows how a processor normalises


def load_source(name: str, *, sparse: bool = False, field: str = FIELD) -> tuple[PreTrainedModel, set[str]]:
    """Return the encoder in a folder or on the Hub, in evaluation mode, and the names of tensors that it has not.

    Args:
        name: Of a run, of its `pretraining`, or of another maker; of a model of images and text its vision tower
            is taken.
        sparse: Make a BigBirdViT of it.
        field: What named it, for errors.

    Raises:
        InputError: No vision encoder there, one that lacks tensors, or one that cannot be made sparse.
    """
    config = load_config(name, field)
    of_run = config.model_type == VicRegForPreTraining.config_class.model_type
    kind = config.encoder.model_type if of_run else config.model_type
    if sparse and kind not in SOURCES:
        remedy = "--model.attention_type block_sparse" if kind == BigBirdViTModel.config_class.model_type else "none"
        raise InputError(
            f"`sparse`: expected a `{field}` of type {', '.join(SOURCES)}, got {kind!r}; leave it out"
            f"{'' if remedy == 'none' else f', and add {remedy}'}."
        )
    if sparse and not of_run:
        with quiet_transformers(), blamed_on(field, f"{name!r} cannot be made sparse"):
            encoder: PreTrainedModel = BigBirdViTModel.from_dense(name).float()
        missing: set[str] = set()
    else:
        encoder, missing = _as_it_is(name, config, field)
        if sparse:
            with blamed_on(field, f"{name!r} cannot be made sparse"):
                encoder, missing = BigBirdViTModel.from_dense(encoder), set()
    if sparse:
        encoder.config.attention_type = "block_sparse"
    _refuse_blind(name, encoder.eval(), field)
    return encoder, missing


def _as_it_is(name: str, config: PreTrainedConfig, field: str) -> tuple[PreTrainedModel, set[str]]:
    tower = getattr(config, "vision_config", None)  # of a model of images and text
    # of a run of ours: the part of its model that is the encoder
    part = PARTS.get(config.model_type)
    if part is not None:
        tower = None
    model_class: Any = part[0] if part is not None else MODEL_MAPPING.get(type(tower or config), None)
    if model_class is None or model_class.main_input_name != "pixel_values":
        takes = "has no encoder" if model_class is None else f"takes `{model_class.main_input_name}`"
        raise InputError(
            f"`{field}`: expected a vision encoder, got {name!r} of type {config.model_type!r}, which {takes}; name "
            "one of images."
        )
    try:
        model, info = load_weights(model_class, name, **({} if tower is None else {"config": tower}))
    except (OSError, ValueError, StrictDataclassError) as error:
        raise no_model(name, error, field) from error
    lacking = sorted(info["missing_keys"])
    if part is not None:
        prefix = f"{part[1]}."
        lacking = [one.removeprefix(prefix) for one in lacking if one.startswith(prefix)]
    needed = [one for one in lacking if not one.endswith("mask_token") and "pooler" not in one]
    if needed:
        more = f" and {len(needed) - 1} more" if len(needed) > 1 else ""
        raise InputError(
            f"`{field}`: expected weights for the whole encoder in {name!r}, found none for {needed[0]}{more}; name a "
            "complete checkpoint of it."
        )
    return (model if part is None else getattr(model, part[1])), set(lacking)


@torch.no_grad()
def _refuse_blind(name: str, encoder: PreTrainedModel, field: str) -> None:
    """Raise InputError for a model that makes no features of an image of its own size."""
    size = image_size_of(encoder.config) or (64, 64)
    try:
        features = pooled_features(
            encoder(pixel_values=torch.zeros(1, getattr(encoder.config, "num_channels", 3), *size))
        )
        assert features.shape == (1, representation_size(encoder.config))
    except Exception as error:  # whatever a model of another kind makes of an image
        raise InputError(
            f"`{field}`: expected a vision encoder, but {name!r} of type {encoder.config.model_type!r} makes no "
            f"features of an image: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error


def normalisation_of(name: str, config: PreTrainedConfig, field: str = FIELD) -> tuple[list[float], list[float]]:
    """Return mean and deviation by which the source's processor normalises pixels in [0, 1].

    Raises:
        InputError: Its processor cannot be read, or does something else to colours.
    """
    processor = load_processor(_of_run(name), config, field)
    stated = processor.to_dict()
    if stated.get("channel_low") is not None:
        return list(stated["image_mean"]), list(stated["image_std"])
    scale = 255 * stated.get("rescale_factor", 1 / 255) if stated.get("do_rescale", True) else 255.0
    mean, std = (stated["image_mean"], stated["image_std"]) if stated.get("do_normalize", True) else (0.0, 1.0)
    mean, std = ([one / scale for one in _each(values)] for values in (mean, std))
    shown = processor([Image.new("RGB", (256, 256), COLOUR)], return_tensors="pt")["pixel_values"][0]
    found = shown[:, shown.shape[1] // 2, shown.shape[2] // 2].tolist()
    expected = [(value / 255 - one) / other for value, one, other in zip(COLOUR, mean, std, strict=True)]
    if any(abs(one - other) > 1e-3 * (1 + abs(other)) for one, other in zip(found, expected, strict=True)):
        raise InputError(
            f"`{field}`: expected an image processor that takes a mean from RGB and divides it, {name!r} makes "
            f"{[round(one, 3) for one in found]} of what would be {[round(one, 3) for one in expected]}; give the "
            "source another one."
        )
    return mean, std


def channels_of(name: str, config: PreTrainedConfig) -> dict[str, list[float]] | None:
    """Return the normalisation of a source's own channels, as fields of the views; None for one of RGB."""
    if not (Path(_of_run(name)) / "preprocessor_config.json").exists():
        return None
    stated = load_processor(_of_run(name), config, FIELD).to_dict()
    if stated.get("channel_low") is None:
        return None
    return {key: list(stated[key]) for key in ("channel_low", "channel_high", "image_mean", "image_std")}


def inflated_weights(weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
    """Return the weights of a first layer for another number of channels; None where that is not what differs.

    Each channel gets the mean over the source's, times the source's number over the wanted one: an image of equal
    channels is embedded as before. Source: Carreira and Zisserman 2017 (arXiv 1705.07750), section 2, for time.

    Args:
        weights: `(out, channels, height, width)`.
        wanted: Of the layer they are for.
    """
    own, other = weights.shape, wanted.shape
    if len(own) != 4 or len(other) != 4 or (own[0], *own[2:]) != (other[0], *other[2:]) or own[1] == other[1]:
        return None
    return weights.mean(1, keepdim=True).expand(-1, other[1], -1, -1) * (own[1] / other[1])


def trained_image_size(name: str, config: PreTrainedConfig, field: str) -> tuple[int, int] | None:
    """Return the size of the images that an encoder learned from, (height, width) in pixels.

    That of the views in the recipe beside a BigBirdViT, which may be used with images of another size; otherwise its
    own, None for an encoder that names none.

    Args:
        name: Folder, Hub id or name of the package's.
        config: Of the encoder, as it is stored.
        field: What named it, for errors.

    Raises:
        InputError: The Hub does not say whether there is a recipe, so that no other process may guess otherwise.
    """
    own = image_size_of(config)
    if config.model_type != BigBirdViTModel.config_class.model_type:
        return own
    folder = located(_of_run(name))
    try:
        recipe = cached_file(folder, RECIPE, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise InputError(
            f"`{field}`: expected to find or miss the recipe of {name!r}, which says what size its views had, got no "
            "answer from the Hub; give `views.image_size`, or try again."
        ) from error
    try:
        views = {} if recipe is None else read_recipe(recipe).get("views")
    except InputError:
        views = None
    size = views.get("image_size", own) if isinstance(views, dict) else None
    pair = [size, size] if isinstance(size, int) else list(size or [])
    if [type(one) for one in pair] == [int, int]:
        return (pair[0], pair[1])
    logger.warning("the recipe of %s says no size of its views: %s pixels, as it is used with", name, own)
    return own


def _of_run(name: str) -> str:
    """Return the folder of a run for its `pretraining` folder, which has no image processor; other names as is."""
    if not (Path(name) / "preprocessor_config.json").exists() and (Path(name).parent / RECIPE).exists():
        return str(Path(name).parent)
    return name


def _each(values: float | Iterable[float]) -> list[float]:
    return [float(values)] * 3 if isinstance(values, int | float) else [float(one) for one in values]


def resampled_table(
    source: PreTrainedModel, key: str, wanted: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor | None:
    """Return a source's table of positions for images of another size, as it would resample it itself.

    Args:
        source: The encoder.
        key: Name of the tensor.
        wanted: The tensor of an encoder of that image size.
        size: (height, width) in pixels.

    Returns:
        A tensor of as many numbers as `wanted`; None if the source resamples none there.
    """
    owner: nn.Module = source
    for part in key.split(".")[:-1]:
        owner = getattr(owner, part)
        if isinstance(owner, BigBirdViTEmbeddings):
            own, config = owner.position_embeddings, owner.config
            assert own is not None
            table = own[0, 1:].unflatten(0, config.grid_size(*config.image_size_hw))
            patches = resampled_positions(table, None, *config.grid_size(*size), config.interpolate_antialias)
            return torch.cat([own[:, :1], patches], dim=1)
        resample: Any = getattr(owner, "interpolate_pos_encoding", None)
        if resample is not None:
            tokens = torch.zeros(1, *wanted.shape[-2:])
            try:
                return resample(tokens, *size)
            except (RuntimeError, ValueError, TypeError):  # a table that is not square
                return None
    return None


def image_size_of(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Return an encoder's own image size, (height, width) in pixels; None for one that names none."""
    size = getattr(config, "image_size", None)
    return None if size is None else (size, size) if isinstance(size, int) else tuple(size)
