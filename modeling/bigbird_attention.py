"""One attention function over a block pattern, in several implementations that compute the same numbers.

Shapes: B batch, H heads, N tokens (global ones first, then patches in tile-major order), D head size, T tiles, S
patches in a full tile, K tiles that a tile sees, G global tokens.

- `eager`: dense scores with the pattern as a mask. The oracle; the only one that returns probabilities.
- `sdpa`: torch's scaled dot product attention, either dense with a mask or over gathered blocks, whichever costs
  less at that size. The choice is a pure function of the pattern, so it is the same in training and inference.

Source: Zaheer et al. 2020 (arXiv 2007.14062), appendix D, for gathering blocks of keys.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from .bigbird_pattern import BlockPattern

# Measured on 2 CPU cores, forward and backward, 6 heads of 64 (benchmarks/results/attention.json): gathered blocks are
# about even at 2,305 tokens and win at 4,097, and only while they skip at least half of the pairs, for they copy keys
# and values once per tile that sees them.
BLOCKS_MIN_TOKENS = 3072
BLOCKS_MAX_DENSITY = 0.5


def prefers_blocks(pattern: BlockPattern) -> bool:
    """Return whether `sdpa` gathers blocks for this pattern instead of masking a dense score matrix."""
    return pattern.num_tokens >= BLOCKS_MIN_TOKENS and pattern.density <= BLOCKS_MAX_DENSITY


@lru_cache(maxsize=24)
def _dense_bias(pattern: BlockPattern, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """Additive mask `(1, H or 1, N, N)` of 0 and -inf; None for a full pattern.

    Cached, for building it is not free; the 24 latest, one per layer and grid, stay for the life of the process.
    """
    if pattern.is_full:
        return None
    with torch.inference_mode(False):
        allowed = pattern.token_mask().to(device)
        return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, float("-inf"))[None]


def _key_bias(key_valid: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask `(B, 1, 1, N)` of 0 and -inf from `(B, N)` bool."""
    bias = torch.zeros(key_valid.shape, dtype=dtype, device=key_valid.device)
    return bias.masked_fill(~key_valid, float("-inf"))[:, None, None, :]


def _combined_bias(
    pattern: BlockPattern, key_valid: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    bias = _dense_bias(pattern, dtype, device)
    if key_valid is None:
        return bias
    padding = _key_bias(key_valid, dtype)
    return padding if bias is None else bias + padding


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
        kwargs: Ignored; transformers passes flags of other models along.

    Returns:
        Output `(B, N, H, D)` and probabilities `(B, H, N, N)`.
    """
    scores = query @ key.transpose(-1, -2) * scaling
    bias = _combined_bias(pattern, attention_mask, query.dtype, query.device)
    if bias is not None:
        scores = scores + bias
    # at least fp32 in the softmax, as fused kernels have it
    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    probabilities = scores.softmax(-1, dtype=softmax_dtype).to(query.dtype)
    probabilities = F.dropout(probabilities, dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2), probabilities


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
    """Return attention by torch's fused kernel, dense or over gathered blocks as `prefers_blocks` says.

    Arguments as in `eager_attention`. Returns the output `(B, N, H, D)` and None in place of probabilities.
    """
    attend = blocks_attention if prefers_blocks(pattern) else dense_attention
    output = attend(query, key, value, attention_mask, pattern=pattern, scaling=scaling, dropout=dropout)
    return output.transpose(1, 2), None


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
    bias = _combined_bias(pattern, key_valid, query.dtype, query.device)
    return F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout, scale=scaling)


@lru_cache(maxsize=64)
def _block_tables(
    pattern: BlockPattern, num_heads: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Index tables of the gathered form, on the device.

    Returns:
        `patch_at_slot` `(T * S,)`: position of the patch in each slot of the padded tiles, 0 in empty slots; None when
            every tile is full, so that tiles are a view.
        `slot_of_patch` `(patches,)`: where each patch sits among the slots.
        `blocks` `(H * T * K,)`: the tiles that each head's tile sees, as indices into `H * T`; any tile in unused
            places.
        `key_exists` `(H or 1, T, K, S)` bool: false for unused places and empty slots; None when there are none.
    """
    with torch.inference_mode(False), pattern.order.device:  # the tables' own device, whatever the default is
        sizes, neighbours = pattern.tile_sizes, pattern.neighbours
        num_tiles, largest = pattern.num_tiles, int(sizes.max())
        starts = sizes.cumsum(0) - sizes
        within = torch.arange(len(pattern.order)) - starts[pattern.tile_of_patch]
        slot_of_patch = pattern.tile_of_patch * largest + within
        patch_at_slot = torch.zeros(num_tiles * largest, dtype=torch.int64)
        patch_at_slot[slot_of_patch] = torch.arange(len(pattern.order))
        slot_exists = torch.arange(largest) < sizes[:, None]

        used = neighbours >= 0
        blocks = neighbours.where(used, 0)
        key_exists = used[..., None] & slot_exists[blocks]
        heads = torch.arange(num_heads)[:, None, None]
        flat_blocks = (heads * num_tiles + blocks).flatten()
        return (
            None if bool(slot_exists.all()) else patch_at_slot.to(device),
            slot_of_patch.to(device),
            flat_blocks.to(device),
            None if bool(key_exists.all()) else key_exists.to(device),
        )


def blocks_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_valid: torch.Tensor | None,
    *,
    pattern: BlockPattern,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return attention `(B, H, N, D)` computed only for the pairs of tiles in the pattern.

    Each tile's queries meet the global tokens' keys and the gathered keys of the tiles it sees; the global tokens'
    queries meet all keys.
    """
    batch, num_heads, _, head_dim = query.shape
    num_global, num_tiles = pattern.num_global_tokens, pattern.num_tiles
    patch_at_slot, slot_of_patch, blocks, key_exists = _block_tables(pattern, num_heads, query.device)

    def to_tiles(tokens: torch.Tensor) -> torch.Tensor:  # (B, H, patches, D) -> (B, H * T, S, D)
        if patch_at_slot is not None:
            tokens = tokens.index_select(2, patch_at_slot)
        return tokens.reshape(batch, num_heads * num_tiles, -1, head_dim)

    def seen_by_tiles(tokens: torch.Tensor) -> torch.Tensor:  # (B, H, N, D) -> (B, H * T, G + K * S, D)
        seen = to_tiles(tokens[:, :, num_global:]).index_select(1, blocks)
        seen = seen.view(batch, num_heads * num_tiles, -1, head_dim)
        shared = tokens[:, :, None, :num_global].expand(-1, -1, num_tiles, -1, -1)
        return torch.cat([shared.reshape(batch, num_heads * num_tiles, num_global, head_dim), seen], dim=2)

    bias = None
    if key_exists is not None or key_valid is not None:
        visible = _visible_keys(key_exists, key_valid, pattern, patch_at_slot, blocks, num_heads)
        bias = torch.zeros(visible.shape, dtype=query.dtype, device=query.device)
        bias = bias.masked_fill(~visible, float("-inf")).expand(batch, -1, -1, -1)

    tile_queries = to_tiles(query[:, :, num_global:])
    tiles = F.scaled_dot_product_attention(
        tile_queries, seen_by_tiles(key), seen_by_tiles(value), bias, dropout_p=dropout, scale=scaling
    ).reshape(batch, num_heads, -1, head_dim)
    if patch_at_slot is not None:
        tiles = tiles.index_select(2, slot_of_patch)

    global_bias = None if key_valid is None else _key_bias(key_valid, query.dtype)
    globals_ = F.scaled_dot_product_attention(
        query[:, :, :num_global], key, value, global_bias, dropout_p=dropout, scale=scaling
    )
    return torch.cat([globals_, tiles], dim=2)


def _visible_keys(
    key_exists: torch.Tensor | None,
    key_valid: torch.Tensor | None,
    pattern: BlockPattern,
    patch_at_slot: torch.Tensor | None,
    blocks: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """`(B or 1, H * T, 1, G + K * S)` bool: the gathered keys that exist and are not padding."""
    num_global, num_tiles = pattern.num_global_tokens, pattern.num_tiles
    parts = []
    if key_exists is not None:
        exists = key_exists.expand(num_heads, -1, -1, -1).reshape(1, num_heads * num_tiles, -1)
        parts.append(F.pad(exists, (num_global, 0), value=True))
    if key_valid is not None:
        valid = key_valid[:, num_global:]
        if patch_at_slot is not None:
            valid = valid[:, patch_at_slot]
        seen = valid.reshape(len(valid), num_tiles, -1)[:, blocks % num_tiles]
        seen = seen.reshape(len(valid), num_heads * num_tiles, -1)
        shared = key_valid[:, None, :num_global].expand(-1, num_heads * num_tiles, -1)
        parts.append(torch.cat([shared, seen], dim=2))
    visible = parts[0] if len(parts) == 1 else parts[0] & parts[1]
    return visible[:, :, None, :]


__all__ = ["blocks_attention", "dense_attention", "eager_attention", "prefers_blocks", "sdpa_attention"]
