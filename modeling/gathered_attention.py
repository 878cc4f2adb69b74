"""Attention over a block pattern by torch's fused kernel on gathered keys and values: any device, with dropout.

Shapes: B batch, H heads, N tokens (global ones first, then patches in tile-major order), D head size, T tiles, S
patches in a full tile, K tiles that a tile sees, G global tokens.

Source: Zaheer et al. 2020 (arXiv 2007.14062), appendix D, for gathering blocks of keys.
"""

import torch
import torch.nn.functional as F

from .bigbird_pattern import BlockPattern, named_pattern
from .block_sparse_attention import NAMESPACE
from .dense_attention import attend, with_padding
from .table_store import cached_tables


@torch.library.custom_op(f"{NAMESPACE}::block_tables", mutates_args=())
def _block_tables(name: str, num_heads: int, device: torch.device) -> list[torch.Tensor]:
    """Index tables of the gathered form, on the device.

    Returns:
        `patch_at_slot` `(T * S,)`: position of the patch in each slot of the padded tiles, 0 in empty slots.
        `slot_of_patch` `(patches,)`: where each patch sits among the slots.
        `blocks` `(H * T * K,)`: the tiles that each head's tile sees, as indices into `H * T`; any tile in unused
            places.
        `key_exists` `(H or 1, T, K, S)` bool: false for unused places and empty slots.
        `see_all` `(tokens,)`: positions of the global tokens and of those in global tiles.
    """
    # a compiler may write over what an operator returns
    return [table.clone() for table in _cached_block_tables(named_pattern(name), num_heads, device)]


@_block_tables.register_fake
def _block_tables_fake(name, num_heads, device):
    pattern = named_pattern(name)
    slots = pattern.num_tiles * pattern.largest_tile
    shapes = [
        (slots,),
        (len(pattern.order),),
        (num_heads * pattern.num_tiles * pattern.neighbours.shape[2],),
        (*pattern.neighbours.shape, slots // pattern.num_tiles),
        (pattern.num_see_all,),
    ]
    dtypes = [torch.int64, torch.int64, torch.int64, torch.bool, torch.int64]
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)]


@cached_tables
def _cached_block_tables(pattern: BlockPattern, num_heads: int, device: torch.device) -> list[torch.Tensor]:
    sizes, neighbours = pattern.tile_sizes, pattern.neighbours
    num_tiles, largest = pattern.num_tiles, pattern.largest_tile
    starts = sizes.cumsum(0) - sizes
    within = torch.arange(len(pattern.order)) - starts[pattern.tile_of_patch]
    slot_of_patch = pattern.tile_of_patch * largest + within
    patch_at_slot = torch.zeros(num_tiles * largest, dtype=torch.int64)
    patch_at_slot[slot_of_patch] = torch.arange(len(pattern.order))
    slot_exists = torch.arange(largest) < sizes[:, None]
    used = neighbours >= 0
    blocks = neighbours.where(used, 0)
    heads = torch.arange(num_heads)[:, None, None]
    in_global_tile = torch.isin(pattern.tile_of_patch, torch.tensor(pattern.global_tiles, dtype=torch.int64))
    tables = (
        patch_at_slot,
        slot_of_patch,
        (heads * num_tiles + blocks).flatten(),
        used[..., None] & slot_exists[blocks],
        torch.cat(
            [torch.arange(pattern.num_global_tokens), in_global_tile.nonzero()[:, 0] + pattern.num_global_tokens]
        ),
    )
    return [table.to(device) for table in tables]


@torch.compiler.assume_constant_result
def _tiles_are_even(name: str) -> bool:
    sizes = named_pattern(name).tile_sizes
    return bool((sizes == sizes[0]).all())


@torch.compiler.assume_constant_result
def _rows_are_even(name: str) -> bool:
    return bool((named_pattern(name).neighbours >= 0).all())


@torch.compiler.assume_constant_result
def _num_see_all(name: str) -> int:
    return named_pattern(name).num_see_all


@torch.compiler.assume_constant_result
def _num_tiles(name: str) -> int:
    return named_pattern(name).num_tiles


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
    num_global, num_tiles = pattern.num_global_tokens, _num_tiles(pattern.name)
    if torch.compiler.is_compiling():
        tables = _block_tables(pattern.name, num_heads, query.device)
    else:
        tables = _cached_block_tables(pattern, num_heads, query.device)
    patch_at_slot, slot_of_patch, blocks, key_exists, see_all = tables
    if _tiles_are_even(pattern.name):
        patch_at_slot = None  # tiles are a view
        key_exists = None if _rows_are_even(pattern.name) else key_exists

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
        output = output.index_select(2, slot_of_patch)
    output = torch.cat([output.new_zeros(batch, num_heads, num_global, head_dim), output], dim=2)

    if _num_see_all(pattern.name) == 0:
        return output
    bias, sees_nothing = (None, None) if key_valid is None else with_padding(None, key_valid, query.dtype)
    dense = attend(query.index_select(2, see_all), key, value, bias, sees_nothing, scaling, dropout)
    return output.index_copy(2, see_all, dense.to(output.dtype))


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
        seen = valid.reshape(len(valid), num_tiles, -1)[:, blocks % num_tiles]
        seen = seen.reshape(len(valid), num_heads * num_tiles, -1)
        shared = key_valid[:, None, :num_global].expand(-1, num_heads * num_tiles, -1)
        parts.append(torch.cat([shared, seen], dim=2))
    visible = parts[0] if len(parts) == 1 else parts[0] & parts[1]
    return visible[:, :, None, :]


__all__ = ["gathered_attention"]
