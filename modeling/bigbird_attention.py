"""One attention function over a block pattern, in several implementations that compute the same numbers.

Shapes: B batch, H heads, N tokens (global ones first, then patches in tile-major order), D head size.

- `eager`: dense scores with the pattern as a mask. The oracle; the only one that returns probabilities.
- `sdpa`: torch's scaled dot product attention with the pattern as a mask, or attention by blocks, whichever costs less
  at that size. The choice is a pure function of the pattern, so it is the same in training and inference, but where a
  form was measured to be the fastest (`attention_timing.py`).
- `flex_attention`: torch's FlexAttention over blocks of tokens, for GPUs; on a CPU forward only.

In all of them a query that sees no valid key gets zeros, and no device is waited for.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .block_sparse_attention import block_sparse_attention
from .dense_attention import combined_bias, dense_attention
from .flex_block_attention import flex_block_attention
from .gathered_attention import gathered_attention
from .grid_plan import reorder
from .pattern_tables import BlockPattern, constant

# Costs in units of one (query, key) pair of dense attention, measured on 2 CPU cores, forward and backward, with grids
# of 14x14 to 64x64 patches in tiles of 2x2 to 16x16 (docs/decisions/0003-cpu-kernel.md).
PAIR_COST = 1.5
TILE_COST = 10_000


def prefers_blocks(pattern: BlockPattern) -> bool:
    """Return whether `sdpa` computes this pattern by blocks instead of masking a dense score matrix.

    The rule: N^2 pairs of dense attention against `PAIR_COST` for each pair left and `TILE_COST` for each tile.
    On square grids, with 3 random tiles, blocks win from 1,089 patches on with tiles of 8x8 and from 961 with 4x4.
    """
    dense = pattern.num_tokens**2
    return PAIR_COST * pattern.density * dense + TILE_COST * pattern.num_tiles < dense


def eager_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pattern: BlockPattern,
    scaling: float,
    dropout: float = 0.0,
    orders: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention and its probabilities from the dense, masked score matrix.

    Args:
        module: The attention layer; its `training` flag switches dropout.
        query: `(B, H, N, D)`.
        key: `(B, H, N, D)`.
        value: `(B, H, N, D)`.
        attention_mask: `(B, N)` bool, false for keys that are padding; `None` if there are none.
        pattern: Which token sees which.
        scaling: Factor on the scores.
        dropout: Dropout probability on the attention probabilities.
        orders: Indices that turn raster order into tile-major order, and back: probabilities come in raster order.
        kwargs: Ignored; transformers passes flags of other models along.

    Returns:
        Output `(B, N, H, D)` and probabilities `(B, H, N, N)`.

    Raises:
        ValueError: A mask of another shape or type, or a pattern for another number of heads.
    """
    _check_inputs(query, attention_mask, pattern)
    scores = (query * scaling) @ key.transpose(-1, -2)  # scaled before: products of halves overflow
    bias, sees_nothing = combined_bias(pattern, attention_mask, query.dtype, query.device)
    if bias is not None:
        scores = scores + bias
    # at least fp32 in the softmax, as fused kernels have it
    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    probabilities = scores.softmax(-1, dtype=softmax_dtype).to(query.dtype)
    if sees_nothing is not None:
        probabilities = probabilities.masked_fill(sees_nothing, 0)
    probabilities = F.dropout(probabilities, dropout, training=module.training)
    to_tiles, to_raster = orders or (None, None)
    probabilities = reorder(reorder(probabilities, to_raster, 2), to_raster, 3)
    output = reorder(probabilities @ reorder(value, to_raster, 2), to_tiles, 2)
    return output.transpose(1, 2), probabilities


def sdpa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pattern: BlockPattern,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Return attention in the form that costs least at this size.

    Arguments as in `eager_attention`; a module's `attention_forms` names forms by grid. Returns the output
    `(B, N, H, D)` and None in place of probabilities.

    - `dense`: `dense_attention`, where `prefers_blocks` says no.
    - `blocks`: `block_sparse_attention`, else, on a CPU.
    - `gathered`: `gathered_attention`, with dropout and on other devices; its copies of keys and values are made again
      in the backward pass. Exported programs have it too: its operators are torch's.
    - `flex`: `flex_block_attention`, on a GPU, where it was measured to be the fastest.
    """
    _check_inputs(query, attention_mask, pattern)
    inputs = query, key, value, attention_mask
    pattern = constant(pattern)
    legal = legal_forms(query.device.type, dropout)
    form = getattr(module, "attention_forms", {}).get(pattern.grid)
    if form not in legal or len(pattern.order) != pattern.grid[0] * pattern.grid[1]:  # of a part of the patches
        form = "dense" if not prefers_blocks(pattern) else "blocks" if "blocks" in legal else "gathered"
    if form == "dense":
        output = dense_attention(*inputs, pattern=pattern, scaling=scaling, dropout=dropout)
    elif form == "blocks":
        output = block_sparse_attention(*inputs, pattern=pattern, scaling=scaling)
    elif form == "flex":
        output = flex_block_attention(*inputs, pattern=pattern, scaling=scaling)
    elif torch.compiler.is_compiling():
        output = gathered_attention(*inputs, pattern=pattern, scaling=scaling, dropout=dropout)
    else:
        gathered = partial(gathered_attention, pattern=pattern, scaling=scaling, dropout=dropout)
        output = checkpoint(gathered, *inputs, use_reentrant=False)
    return output.transpose(1, 2), None


def legal_forms(device: str, dropout: float) -> tuple[str, ...]:
    """Return the forms that `sdpa` may take in training, on a type of device and with a dropout probability."""
    forms = ["dense", "gathered"]
    if device == "cpu" and dropout == 0 and not _exporting():
        forms.append("blocks")
    if device == "cuda" and dropout == 0:
        forms.append("flex")
    return tuple(forms)


@torch.compiler.assume_constant_result
def _exporting() -> bool:
    return torch.compiler.is_exporting()  # asked outside of the trace: torch 2.11 answers yes while it compiles


def flex_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pattern: BlockPattern,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Return attention by torch's FlexAttention.

    Arguments as in `eager_attention`. Returns the output `(B, N, H, D)` and None in place of probabilities.

    Raises:
        ValueError: Dropout, gradients on a CPU, or as in `eager_attention`.
    """
    if dropout > 0:
        raise ValueError(
            f"`attention_probs_dropout_prob`: expected 0 with 'flex_attention', got {dropout}; "
            "call `model.set_attn_implementation('sdpa')`."
        )
    _check_inputs(query, attention_mask, pattern)
    output = flex_block_attention(query, key, value, attention_mask, pattern=pattern, scaling=scaling)
    return output.transpose(1, 2), None


def _check_inputs(query: torch.Tensor, attention_mask: torch.Tensor | None, pattern: BlockPattern) -> None:
    heads = len(pattern.neighbours)
    if heads not in (1, query.shape[1]):
        raise ValueError(f"`pattern`: expected a table for all heads or {query.shape[1]}, one for each, got {heads}.")
    expected = query.shape[0], query.shape[2]
    if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.shape != expected):
        raise ValueError(
            f"`attention_mask`: expected bool (batch, tokens) {expected}, "
            f"got {attention_mask.dtype} {tuple(attention_mask.shape)}."
        )


__all__ = ["eager_attention", "flex_attention", "legal_forms", "prefers_blocks", "sdpa_attention"]
