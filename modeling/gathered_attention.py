"""Attention over a block pattern by torch's fused kernel on gathered keys and values: any device, with dropout.

Shapes: B batch, H heads, N tokens (global ones first, then patches in tile-major order), D head size, T tiles, S
patches in a full tile, K tiles that a tile sees, G global tokens.

Source: Zaheer et al. 2020 (arXiv 2007.14062), appendix D, for gathering blocks of keys.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .dense_attention import attend, with_padding
from .pattern_tables import BlockPattern, constant, derived


class GatheredTables(NamedTuple):
    """Index tables of the gathered form, on one device.

    Attributes:
        patch_at_slot: `(T * S,)`, position of the patch in each slot of the padded tiles, 0 in empty slots; None where
            no slot is empty.
        slot_of_patch: `(patches,)`, where each patch sits among the slots.
        blocks: `(H * T * K,)`, the tiles that each head's tile sees, as indices into `H * T`; any tile in unused
            places.
        key_exists: `(H or 1, T, K, S)` bool: false for unused places and empty slots; None where there are none.
        see_all: `(tokens,)`, positions of the global tokens and of those in global tiles.
    """

    patch_at_slot: torch.Tensor | None
    slot_of_patch: torch.Tensor
    blocks: torch.Tensor
    key_exists: torch.Tensor | None
    see_all: torch.Tensor


def gathered_tables(pattern: BlockPattern, num_heads: int, device: torch.device) -> GatheredTables:
    """Return the tables for so many heads; those of a pattern with a plan for each head have as many."""
    sizes, neighbours = pattern.tile_sizes, pattern.neighbours
    num_tiles, largest, patches = pattern.num_tiles, pattern.largest_tile, len(pattern.order)
    position, tiles = torch.arange(patches), torch.arange(num_heads * num_tiles)
    starts = sizes.cumsum(0) - sizes
    slot_of_patch = pattern.tile_of_patch * largest + position - starts[pattern.tile_of_patch]
    patch_at_slot = torch.zeros(num_tiles * largest, dtype=torch.int64)
    patch_at_slot[slot_of_patch] = position
    slot_exists = torch.arange(largest) < sizes[:, None]
    used = neighbours >= 0
    blocks = neighbours.where(used, 0)
    first_tile = tiles[::num_tiles, None, None]  # of each head
    is_global = torch.zeros(num_tiles, dtype=torch.bool)
    is_global[list(pattern.global_tiles)] = True
    see_all = torch.ones(pattern.num_global_tokens + patches, dtype=torch.bool)
    see_all[pattern.num_global_tokens :] = is_global[pattern.tile_of_patch]
    even = bool(slot_exists.all())  # tiles are a view
    return GatheredTables(
        None if even else patch_at_slot.to(device),
        slot_of_patch.to(device),
        (first_tile + blocks).flatten().to(device),
        None if even and bool(used.all()) else (used[..., None] & slot_exists[blocks]).to(device),
        see_all.nonzero()[:, 0].to(device),
    )


class _Gather(torch.autograd.Function):
    """`tokens.index_select(1, blocks)`, whose gradient is summed in at least fp32: a block is seen by many tiles."""

    @staticmethod
    def forward(ctx, tokens, blocks):
        ctx.save_for_backward(blocks)
        ctx.shape = tokens.shape
        return tokens.index_select(1, blocks)

    @staticmethod
    def backward(ctx, gradient):
        (blocks,) = ctx.saved_tensors
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros(ctx.shape, dtype=dtype).index_add(1, blocks, gradient.to(dtype))
        return total.to(gradient.dtype), None


def gathered_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_valid: torch.Tensor | None,
    *,
    pattern: BlockPattern,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return attention `(B, H, N, D)` by torch's fused kernel over gathered keys and values.

    Each tile's queries meet the global tokens' keys and the gathered keys of the tiles it sees; the queries of global
    tokens and tiles meet all keys.
    """
    batch, num_heads, _, head_dim = query.shape
    pattern = constant(pattern)
    num_global, num_tiles = pattern.num_global_tokens, pattern.num_tiles
    tables = derived(pattern, gathered_tables, num_heads, query.device)
    patch_at_slot, blocks, key_exists = tables.patch_at_slot, tables.blocks, tables.key_exists

    def to_tiles(tokens: torch.Tensor) -> torch.Tensor:  # (B, H, patches, D) -> (B, H * T, S, D)
        if patch_at_slot is not None:
            tokens = tokens.index_select(2, patch_at_slot)
        return tokens.reshape(batch, num_heads * num_tiles, -1, head_dim)

    def seen_by_tiles(tokens: torch.Tensor) -> torch.Tensor:  # (B, H, N, D) -> (B, H * T, G + K * S, D)
        seen = _Gather.apply(to_tiles(tokens[:, :, num_global:]), blocks)
        seen = seen.view(batch, num_heads * num_tiles, -1, head_dim)
        shared = tokens[:, :, None, :num_global].expand(-1, -1, num_tiles, -1, -1)
        return torch.cat([shared.reshape(batch, num_heads * num_tiles, num_global, head_dim), seen], dim=2)

    bias = sees_nothing = None
    if key_exists is not None or key_valid is not None:
        visible = _visible_keys(key_exists, key_valid, num_global, num_tiles, patch_at_slot, blocks, num_heads)
        sees_nothing = ~visible.any(-1, keepdim=True)
        bias = torch.zeros(visible.shape, dtype=query.dtype, device=query.device)
        bias = bias.masked_fill(~(visible | sees_nothing), float("-inf")).expand(batch, -1, -1, -1)
        sees_nothing = None if key_valid is None else sees_nothing
    output = attend(
        to_tiles(query[:, :, num_global:]),
        seen_by_tiles(key),
        seen_by_tiles(value),
        bias,
        sees_nothing,
        scaling,
        dropout,
    ).reshape(batch, num_heads, -1, head_dim)
    if patch_at_slot is not None:
        output = output.index_select(2, tables.slot_of_patch)
    output = torch.cat([output.new_zeros(batch, num_heads, num_global, head_dim), output], dim=2)

    if pattern.num_see_all == 0:
        return output
    bias, sees_nothing = (None, None) if key_valid is None else with_padding(None, key_valid, query.dtype)
    dense = attend(query.index_select(2, tables.see_all), key, value, bias, sees_nothing, scaling, dropout)
    return output.index_copy(2, tables.see_all, dense.to(output.dtype))


def _visible_keys(
    key_exists: torch.Tensor | None,
    key_valid: torch.Tensor | None,
    num_global: int,
    num_tiles: int,
    patch_at_slot: torch.Tensor | None,
    blocks: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """`(B or 1, H * T, 1, G + K * S)` bool: the gathered keys that exist and are not padding."""
    parts = []
    if key_exists is not None:
        exists = key_exists.expand(num_heads, -1, -1, -1).reshape(1, num_heads * num_tiles, -1)
        parts.append(F.pad(exists, (num_global, 0), value=True))
    if key_valid is not None:
        valid = key_valid[:, num_global:]
        if patch_at_slot is not None:
            valid = valid[:, patch_at_slot]
        seen = valid.reshape(valid.shape[0], num_tiles, -1)[:, blocks % num_tiles]
        seen = seen.reshape(valid.shape[0], num_heads * num_tiles, -1)
        shared = key_valid[:, None, :num_global].expand(-1, num_heads * num_tiles, -1)
        parts.append(torch.cat([shared, seen], dim=2))
    visible = parts[0] if len(parts) == 1 else parts[0] & parts[1]
    return visible[:, :, None, :]


__all__ = ["gathered_attention", "gathered_tables"]
