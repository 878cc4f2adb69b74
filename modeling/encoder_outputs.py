"""What an encoder of any kind returns: its outputs, its pooled features, its patch tokens."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


def encoder_outputs(encoder: PreTrainedModel, inputs: dict[str, Any]) -> ModelOutput:
    """What an encoder returns; a ViT's learned positions are interpolated where images are not of its own size."""
    pixel_values = inputs.get("pixel_values")
    size = getattr(encoder.config, "image_size", None)
    own = (size, size) if isinstance(size, int) else None if size is None else tuple(size)
    interpolates = "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters
    if pixel_values is not None and interpolates and own not in (None, tuple(pixel_values.shape[-2:])):
        return encoder(**{"interpolate_pos_encoding": True, **inputs})
    return encoder(**inputs)


def pooled_features(outputs: ModelOutput, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return `(batch, features)` from an encoder's output: its pooled output, or its mean token without one.

    Args:
        outputs: Of an encoder of images or texts.
        attention_mask: `(batch, tokens)`, 0 for the padding of texts, which is left out of the mean.
    """
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    tokens = outputs.last_hidden_state
    if attention_mask is None:
        return tokens.mean(1)
    kept = attention_mask.to(tokens.dtype)[..., None]
    return (tokens * kept).sum(1) / kept.sum(1).clamp(min=1)


def patch_grid(states: torch.Tensor, config: PreTrainedConfig, height: int, width: int) -> torch.Tensor:
    """Return the tokens of the patches `(batch, rows, columns, features)`, in raster order.

    Args:
        states: `last_hidden_state`, for images of this size.
        config: Of the encoder.
        height: Of the pixel values.
        width: Of the pixel values.

    Raises:
        ValueError: The encoder has no token for each patch.
    """
    if states.ndim == 4:  # of a convolutional network: (batch, channels, rows, columns)
        return states.permute(0, 2, 3, 1)
    size = getattr(config, "patch_size", None) or 0
    patch_height, patch_width = (size, size) if isinstance(size, int) else size
    rows = columns = 0
    if hasattr(config, "grid_size"):
        rows, columns = config.grid_size(height, width)
    elif patch_height and patch_width:
        rows, columns = height // patch_height, width // patch_width
    leading = states.shape[1] - rows * columns  # CLS, distillation, registers: they go first
    if not rows * columns or not 0 <= leading <= 2 + (getattr(config, "num_register_tokens", None) or 0):
        raise ValueError(
            f"expected a model with a token for each patch, {config.model_type!r} has {states.shape[1]} tokens for "
            f"{height}x{width} pixels; choose another"
        )
    return states[:, leading:].unflatten(1, (rows, columns))


__all__ = ["encoder_outputs", "patch_grid", "pooled_features"]
