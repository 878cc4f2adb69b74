"""What is trained with a model and is no part of it: low-rank adapters, and the maps that predict a teacher."""

import torch
from transformers import PreTrainedModel

from hf_vicreg.modeling.encoder_outputs import encoder_outputs, patch_grid
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining, representation_size
from hf_vicreg.modeling.taught import Taught
from hf_vicreg.training.engine.encoders import add_adapters
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.pretrained.source_encoder import load_source, normalisation_of
from hf_vicreg.training.run.config import RunConfig

FIELD = "teacher"


def add_companions(model: VicRegForPreTraining, config: RunConfig) -> None:
    """Give a model, in place, the adapters and the teacher that its run asks for.

    Raises:
        InputError: The encoder takes no adapters, or there is no such teacher, or none for these images.
    """
    if config.run.lora_rank:
        add_adapters(model.encoder, config.run.lora_rank)
    if config.run.teacher:
        _add_teacher(model, config)


def take_away_teacher(model: VicRegForPreTraining) -> None:
    """Let a model have its own objective again, in place; one without a teacher stays as it is."""
    if isinstance(model.objective, Taught):
        model.objective = model.objective.inner


def _add_teacher(model: VicRegForPreTraining, config: RunConfig) -> None:
    name = config.run.teacher
    assert name is not None
    if model.second_encoder is not None:
        raise InputError("`teacher`: expected one encoder that learns from it, got a `second_model`; leave one out.")
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
        normalisation=normalisation_of(name, teacher.config, FIELD),
        own_normalisation=config.normalisation,
        with_tokens=_has_tokens(model.encoder, size) and _has_tokens(teacher, size),
    )


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
