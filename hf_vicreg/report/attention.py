"""Attention as a Space shows it, whose refusals are input errors here."""

import torch
from transformers import PreTrainedModel

from hf_vicreg.hub_space import attention
from hf_vicreg.hub_space.attention import AttentionMaps
from hf_vicreg.training.errors import blamed_on


def attention_maps(model: PreTrainedModel, pixels: torch.Tensor, queries: list[int] | None = None) -> AttentionMaps:
    """Return what `output_attentions` of the eager model says of one image, as `hub_space.attention` describes it.

    Raises:
        InputError: A model without attention over patches.
    """
    with blamed_on("MODEL"):
        return attention.attention_maps(model, pixels, queries)


def grid_of(model: PreTrainedModel, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of patches of an image of `height` x `width` pixels.

    Raises:
        InputError: A model without patches.
    """
    with blamed_on("MODEL"):
        return attention.grid_of(model, height, width)
