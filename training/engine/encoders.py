"""How a run's encoders compute: with less memory, compiled, or by another attention. The result stays the same."""

import logging

import torch
from transformers import PreTrainedModel

from hf_vicreg.modeling.modeling_bigbird_vit import IMPLEMENTATIONS
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.engine.optim import layer_depths, num_layers
from hf_vicreg.training.errors import InputError, as_input_error

logger = logging.getLogger(__name__)


def set_up_encoders(
    model: VicRegForPreTraining,
    *,
    gradient_checkpointing: bool,
    torch_compile: bool,
    attn_implementation: str = "sdpa",
    freeze_layers: int = 0,
) -> None:
    """Let the encoders compute their layers again on the way back, compile them, or both; in place.

    With `freeze_layers` the first encoder keeps its embeddings and so many of its layers as they are.

    Names of weights stay those of encoders that are not compiled. Expander and loss are left alone: they work on the
    batch of all processes.

    Raises:
        InputError: An encoder cannot compute its layers again, has no such implementation of attention or fewer
            layers; or `flex_attention`, which has no gradients on a CPU, is asked for without a GPU.
    """
    if attn_implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"`attn_implementation`: expected one of {', '.join(IMPLEMENTATIONS)}, got {attn_implementation!r}."
        )
    if attn_implementation == "flex_attention" and not torch.cuda.is_available():
        raise InputError(
            "`attn_implementation`: expected 'sdpa' or 'eager' for training on a CPU, got 'flex_attention', which has "
            "no backward pass there."
        )
    if freeze_layers:
        _freeze(model.encoder, freeze_layers)
    for encoder in model.encoders:
        if attn_implementation != "sdpa":  # what every model has by itself, if it can
            with as_input_error("attn_implementation"):
                encoder.set_attn_implementation(attn_implementation)
        if gradient_checkpointing:
            # renamed between the oldest transformers we take and the newest
            renamed = hasattr(encoder, "activation_checkpointing_enable")
            name = "activation_checkpointing_enable" if renamed else "gradient_checkpointing_enable"
            with as_input_error("gradient_checkpointing"):
                getattr(encoder, name)({"use_reentrant": False})
        if torch_compile:
            logger.info("the encoder is compiled during the first step, which takes a minute or more")
            encoder.compile()


def _freeze(encoder: PreTrainedModel, count: int) -> None:
    """Keep what lies before an encoder's layers, and so many of them, from learning."""
    depths, layers = layer_depths(encoder), num_layers(encoder)
    if count > layers:
        raise InputError(
            f"`freeze_layers`: expected at most {layers}, the layers of this {encoder.config.model_type}, got {count}."
        )
    for name, parameter in encoder.named_parameters():
        if depths[name] <= count:
            parameter.requires_grad_(False)
