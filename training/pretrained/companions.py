"""What is trained with a model and is no part of it: low-rank adapters, and the maps that predict a teacher."""

import logging
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_vicreg.modeling.encoder_outputs import encoder_outputs, patch_grid
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining, representation_size
from hf_vicreg.modeling.taught import Taught, TaughtByFeatures, WithTeacher
from hf_vicreg.training.engine.encoders import add_adapters
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import public_name
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.images.streaming import ImageStream
from hf_vicreg.training.pretrained.source_encoder import (
    channels_of,
    load_source,
    normalisation_of,
    trained_image_size,
)
from hf_vicreg.training.pretrained.stored_features import stored_features
from hf_vicreg.training.run.config import RunConfig

logger = logging.getLogger(__name__)

FIELD, FEATURES = "teacher", "teacher_features"
OF_PHOTOS = ([0.0] * 3, [255.0] * 3)  # values of RGB that become 0 and 1


def add_companions(
    model: VicRegForPreTraining, config: RunConfig, source: ImageSource | ImageStream | None = None
) -> None:
    """Give a model, in place, the adapters and the teacher that its run asks for.

    Args:
        model: As it was made.
        config: Of the run.
        source: The images that it trains on.

    Raises:
        InputError: The encoder takes no adapters, or there is no such teacher, or none for these images.
    """
    if config.run.lora_rank:
        add_adapters(model.encoder, config.run.lora_rank)
        for copied in model.objective.teachers:  # it follows the encoder, weight by weight
            add_adapters(copied, config.run.lora_rank)
            copied.requires_grad_(False)
    if config.run.teacher:
        _add_teacher(model, config)
    if config.run.teacher_features:
        assert isinstance(source, ImageSource)
        _refuse_second(model, FEATURES)
        features = stored_features(Path(config.run.teacher_features), source)
        width = representation_size(model.encoder.config)
        model.objective = TaughtByFeatures(model.objective, features, width, weight=config.run.teacher_weight)
        name = public_name(config.run.teacher_features)
        logger.info("the encoder learns to predict %d features of %s", features.shape[1], name)


def take_away_teacher(model: VicRegForPreTraining) -> None:
    """Let a model have its own objective again, in place; one without a teacher stays as it is."""
    if isinstance(model.objective, WithTeacher):
        model.objective = model.objective.inner


def _add_teacher(model: VicRegForPreTraining, config: RunConfig) -> None:
    name = config.run.teacher
    assert name is not None
    _refuse_second(model, FIELD)
    teacher, _ = load_source(name, field=FIELD)
    channels, own = (getattr(one.config, "num_channels", 3) for one in (teacher, model.encoder))
    if channels != own:
        raise InputError(f"`{FIELD}`: expected an encoder of images with {own} channels, {name!r} takes {channels}.")
    size = config.image_size
    model.objective = Taught(
        model.objective,
        teacher,
        (representation_size(model.encoder.config), representation_size(teacher.config)),
        weight=config.run.teacher_weight,
        normalisation=_normalisation(name, teacher.config, config),
        own_normalisation=config.normalisation,
        with_tokens=_has_tokens(model.encoder, size) and _has_tokens(teacher, size),
        image_size=trained_image_size(name, teacher.config, FIELD),
    )
    kinds = "pooled features and tokens" if model.objective.with_tokens else "pooled features, for want of tokens,"
    logger.info("the encoder learns to predict %s of %s", kinds, public_name(name))


def _refuse_second(model: VicRegForPreTraining, field: str) -> None:
    if model.second_encoder is not None:
        raise InputError(f"`{field}`: expected one encoder that learns from it, got a `second_model`; leave one out.")


def _normalisation(name: str, teacher: PreTrainedConfig, config: RunConfig) -> tuple[list[float], list[float]]:
    """Return mean and deviation by which a teacher normalises what the run's images have between 0 and 1.

    Values that become 0 and 1 may be others for the teacher than for the run: `(value - low) / (high - low)` of either
    is a line, and so is the one as a function of the other.

    Raises:
        InputError: It takes other channels than RGB and does not say how.
    """
    own = channels_of(name, teacher)
    if own is None and config.num_channels != 3:
        raise InputError(f"`{FIELD}`: expected an image processor of {config.num_channels} channels beside {name!r}.")
    mean, std = normalisation_of(name, teacher, FIELD) if own is None else (own["image_mean"], own["image_std"])
    ranges = OF_PHOTOS if own is None else (own["channel_low"], own["channel_high"])
    found = []
    columns = (*(config.channel_ranges or OF_PHOTOS), *ranges, mean, std)
    for own_low, own_high, low, high, centre, spread in zip(*columns, strict=True):
        ratio = (high - low) / (own_high - own_low)
        found.append((centre * ratio + (low - own_low) / (own_high - own_low), spread * ratio))
    return [centre for centre, _ in found], [spread for _, spread in found]


@torch.no_grad()
def _has_tokens(encoder: PreTrainedModel, size: tuple[int, int]) -> bool:
    """Return whether an encoder has a token for each patch, or a place of its map."""
    own = getattr(encoder.config, "image_size", None)
    height, width = size if own is None else (own, own) if isinstance(own, int) else own
    was_training = encoder.training
    channels = getattr(encoder.config, "num_channels", 3)
    outputs = encoder_outputs(encoder.eval(), {"pixel_values": torch.zeros(1, channels, height, width)})
    encoder.train(was_training)
    try:
        return patch_grid(outputs.last_hidden_state, encoder.config, height, width).shape[-1] > 0
    except ValueError:
        return False
