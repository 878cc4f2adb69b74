"""Where an encoder's patch tokens are in its output, for any vision encoder."""

import torch
from transformers import PreTrainedConfig


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
            f"expected an encoder with a token for each patch, {config.model_type!r} has {states.shape[1]} tokens for "
            f"{height}x{width} pixels"
        )
    return states[:, leading:].unflatten(1, (rows, columns))


__all__ = ["patch_grid"]
