"""Attention over all pairs of tokens with the block pattern as a mask: exact, quadratic, fastest on small grids."""

import torch
import torch.nn.functional as F

from .pattern_tables import BlockPattern, derived


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_valid: torch.Tensor | None,
    *,
    pattern: BlockPattern,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return attention `(B, H, N, D)` over all pairs with the pattern as a mask; no mask for a full pattern."""
    bias, sees_nothing = combined_bias(pattern, key_valid, query.dtype, query.device)
    return attend(query, key, value, bias, sees_nothing, scaling, dropout)


def attend(query, key, value, bias, sees_nothing, scaling: float, dropout: float) -> torch.Tensor:
    """Return torch's attention with an additive mask, and zeros for the queries that see nothing."""
    output = F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout, scale=scaling)
    return output if sees_nothing is None else output.masked_fill(sees_nothing, 0)


def dense_bias(pattern: BlockPattern, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the pattern as an additive mask `(1, H or 1, N, N)` of 0 and -inf."""
    allowed = pattern.token_mask().to(device)
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, float("-inf"))[None]


def combined_bias(
    pattern: BlockPattern, key_valid: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return an additive mask and the queries that see no valid key, `(B, H or 1, N, 1)`; None where there are none.

    The mask lets those queries see everything, so that neither they nor their gradients are NaN: zero their outputs.
    """
    bias = None if pattern.is_full else derived(pattern, dense_bias, dtype, device)
    if key_valid is None:
        return bias, None
    return with_padding(bias, key_valid, dtype)


def with_padding(
    bias: torch.Tensor | None, key_valid: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `bias` with the keys masked that are not `key_valid` `(B, N)`, else as `combined_bias`."""
    padding = torch.zeros(key_valid.shape, dtype=dtype, device=key_valid.device)
    padding = padding.masked_fill(~key_valid, float("-inf"))[:, None, None]
    bias = padding if bias is None else bias + padding
    sees_nothing = (bias == float("-inf")).all(-1, keepdim=True)
    return bias.masked_fill(sees_nothing, 0), sees_nothing


__all__ = ["attend", "combined_bias", "dense_attention", "dense_bias", "with_padding"]
