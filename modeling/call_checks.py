"""What a caller hands to the model, checked before anything is computed: keywords, pixels and masks."""

import difflib

import torch
from transformers.utils import TransformersKwargs, logging

from .configuration_bigbird_vit import BigBirdViTConfig

logger = logging.get_logger(__name__)

# Keywords that a model takes without a parameter of that name. Models and trainers of transformers hand the words of
# `TransformersKwargs` to any model. `interpolate_pos_encoding` is ViT's: here positions always follow the image.
FLAGS = ("output_hidden_states", "output_attentions", "return_dict")
PASSED_ALONG = {*TransformersKwargs.__annotations__, "interpolate_pos_encoding", "use_cache", "debug_io"}


def check_keywords(found: dict, parameters: tuple[str, ...]) -> None:
    """Refuse keywords that would be swallowed.

    Args:
        found: Keywords of a call beside the parameters.
        parameters: The parameters, for the hint.

    Raises:
        TypeError: A keyword that neither this model nor transformers knows.
    """
    for name in found:
        if name not in FLAGS and name not in PASSED_ALONG:
            close = difflib.get_close_matches(name, [*parameters, *FLAGS], n=1)
            hint = f"; did you mean `{close[0]}`?" if close else "."
            raise TypeError(f"`{name}`: expected one of {', '.join([*parameters, *FLAGS])}{hint}")


def asks_for(name: str, config: BigBirdViTConfig, keywords: dict) -> bool:
    """Return whether a call wants `output_NAME`: by its keyword, or without one by the configuration."""
    asked = keywords.get(f"output_{name}")
    return bool(getattr(config, f"output_{name}") if asked is None else asked)


def check_inputs(config: BigBirdViTConfig, pixel_values, pixel_mask) -> None:
    """Check what the model is called with.

    Raises:
        ValueError: `pixel_values` that are not `(batch, channels, height, width)`, or a mask of another shape or type.
    """
    if not isinstance(pixel_values, torch.Tensor):
        raise ValueError(
            "`pixel_values`: expected a tensor (batch, channels, height, width), "
            f"got {'None' if pixel_values is None else type(pixel_values).__name__}."
        )
    if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
        raise ValueError(
            f"`pixel_values`: expected (batch, {config.num_channels} channels, height, width), "
            f"got {tuple(pixel_values.shape)}."
        )
    if pixel_mask is None:
        return
    if not isinstance(pixel_mask, torch.Tensor) or pixel_mask.dtype.is_complex:
        found = getattr(pixel_mask, "dtype", type(pixel_mask).__name__)
        raise ValueError(f"`pixel_mask`: expected a tensor of bool, integers or floats, got {found}.")
    if pixel_mask.shape != (pixel_values.shape[0], *pixel_values.shape[2:]):
        raise ValueError(
            "`pixel_mask`: expected (batch, height, width) "
            f"{(pixel_values.shape[0], *pixel_values.shape[2:])}, got {tuple(pixel_mask.shape)}."
        )


def check_masked(config: BigBirdViTConfig, pixel_values: torch.Tensor, bool_masked_pos) -> torch.Tensor:
    """Return a mask of patches as bool.

    Raises:
        ValueError: A mask that is not `(batch, patches)` of bool or of integers 0 and 1, or patches that overlap.
    """
    config.check_patches_apart()
    rows, columns = config.grid_size(*pixel_values.shape[-2:])
    expected = len(pixel_values), rows * columns
    is_tensor = isinstance(bool_masked_pos, torch.Tensor)
    if not is_tensor or bool_masked_pos.is_floating_point() or tuple(bool_masked_pos.shape) != expected:
        found = (
            f"{bool_masked_pos.dtype} {tuple(bool_masked_pos.shape)}" if is_tensor else type(bool_masked_pos).__name__
        )
        raise ValueError(
            f"`bool_masked_pos`: expected bool (batch, patches) {expected}, patches in raster order of a grid "
            f"{rows}x{columns}, got {found}."
        )
    return bool_masked_pos.to(torch.bool)


def warn_of_eager(implementation: str | None) -> None:
    """Say once that a call which asks for probabilities is computed by another implementation than the model's."""
    if implementation != "eager" and not torch.compiler.is_compiling():
        logger.warning_once(
            f"`output_attentions`: {implementation!r} has no probabilities of attention, so this call is computed by "
            "'eager', with a matrix of all pairs of tokens in each layer."
        )


__all__ = ["asks_for", "check_inputs", "check_keywords", "check_masked", "warn_of_eager"]
