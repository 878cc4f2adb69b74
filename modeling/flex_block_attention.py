"""Attention over a block pattern by torch's FlexAttention: the way on GPUs. On a CPU it has no backward pass.

FlexAttention wants blocks of one legal size, so tokens are laid out anew: global tokens first, filled up to whole
blocks, then the patches. Which blocks see which follows from the pattern's tiles; inside a block that is seen in part,
a function of the two positions decides.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .pattern_tables import BlockPattern, constant, derived

MAX_SHAPES = 4096  # graphs of one process; one more is an error


def flex_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_valid: torch.Tensor | None,
    *,
    pattern: BlockPattern,
    scaling: float,
) -> torch.Tensor:
    """Return attention `(B, H, N, D)`; arguments as in `block_sparse_attention`.

    Raises:
        ValueError: Gradients are wanted on a CPU.
    """
    on_cpu = query.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value)):
        raise ValueError(
            "`attn_implementation`: expected 'sdpa' or 'eager' for training on a CPU, got 'flex_attention', which has "
            "no backward pass there; call `model.set_attn_implementation('sdpa')`."
        )
    pattern = constant(pattern)
    block, num_global, num_tokens = flex_block_size(pattern), pattern.num_global_tokens, query.shape[2]
    filled, length = _lengths(num_global, num_tokens, block)
    patches_end = filled + num_tokens - num_global

    def lay_out(tokens: torch.Tensor) -> torch.Tensor:  # (B, H, N, D) -> (B, H, length, D)
        front = F.pad(tokens[:, :, :num_global], (0, 0, 0, filled - num_global))
        return torch.cat([front, F.pad(tokens[:, :, num_global:], (0, 0, 0, length - patches_end))], dim=2)

    if torch.compiler.is_compiling():
        # views: torch's transposition of tables cannot be traced on constants
        tables = tuple(one.view(one.shape) for one in derived(pattern, flex_tables, block, query.device))
        mask = _mask_from_tables(tables, block, length)
    else:
        mask = derived(pattern, _block_mask, block, length, query.device)
    if key_valid is not None:
        mask = _with_padding(mask, lay_out(key_valid[:, None, :, None])[:, 0, :, 0])
    attend = flex_attention if on_cpu or torch.compiler.is_compiling() else _compiled()
    # kernels default to blocks of 128 on Hopper, which blocks of 64 would not divide
    options = None if block % 128 == 0 else {f"BLOCK_{axis}": 64 for axis in ("M", "N", "M1", "N1", "M2", "N2")}
    output = attend(
        lay_out(query), lay_out(key), lay_out(value), block_mask=mask, scale=scaling, kernel_options=options
    )
    return torch.cat([output[:, :, :num_global], output[:, :, filled:patches_end]], dim=2)


def flex_block_size(pattern: BlockPattern) -> int:
    """Return tokens in a block: 128 where whole tiles fill it, else 64."""
    return 128 if pattern.largest_tile % 128 == 0 else 64


@cache
def _compiled(backend: str = "inductor"):
    """FlexAttention, compiled once for each length and kind of mask; never uncompiled, which would form all scores.

    Past `recompile_limit` shapes, 8 by default, torch would take that form without a word.
    """
    compiled = torch.compile(flex_attention, dynamic=False, backend=backend)
    limits: dict[str, Any] = {
        "recompile_limit": MAX_SHAPES,
        "accumulated_recompile_limit": MAX_SHAPES,
        "fail_on_recompile_limit_hit": True,
    }

    def attend(*tensors, **options):
        with torch._dynamo.config.patch(**limits):
            return compiled(*tensors, **options)

    return attend


def _lengths(num_global: int, num_tokens: int, block: int) -> tuple[int, int]:
    """Return where the patches begin and the length in all, both in whole blocks."""
    filled = -(-num_global // block) * block
    return filled, -(-(filled + num_tokens - num_global) // block) * block


def _block_mask(pattern: BlockPattern, block: int, length: int, device: torch.device) -> BlockMask:
    return _mask_from_tables(flex_tables(pattern, block, device), block, length)


def _mask_from_tables(tables: tuple[torch.Tensor, ...], block: int, length: int) -> BlockMask:
    some, some_at, whole, whole_at, tile_of, sees = tables

    def mask_mod(_batch, head, query_at, key_at):
        return sees[head % sees.shape[0], tile_of[query_at], tile_of[key_at]]

    return BlockMask.from_kv_blocks(
        some, some_at, whole, whole_at, BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(length, length)
    )


def flex_tables(pattern: BlockPattern, block: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return how many blocks each block sees in part, and which; the same of those seen whole; and for the function
    of two positions the tile of each, and which tile sees which, `(heads or 1, tiles + 2, tiles + 2)` bool.
    """
    num_global, num_tiles = pattern.num_global_tokens, pattern.num_tiles
    filled, length = _lengths(num_global, pattern.num_tokens, block)
    blocks = length // block
    # tile of each position: `num_tiles` for global tokens, `num_tiles + 1` where there is no token
    tile_of = torch.full((length,), num_tiles + 1)
    tile_of[:num_global] = num_tiles
    tile_of[filled : filled + len(pattern.order)] = pattern.tile_of_patch
    sees = F.pad(pattern.tile_mask, (0, 1, 0, 1), value=True)
    sees = F.pad(sees, (0, 1, 0, 1))
    # tokens of each tile in each block
    tokens = torch.zeros(blocks, num_tiles + 2, dtype=torch.float64)
    tokens.scatter_add_(1, tile_of.view(blocks, block), torch.ones(blocks, block, dtype=torch.float64))
    pairs = tokens @ sees.to(torch.float64) @ tokens.T
    full = pairs == block * block
    tables = [*_kv_table((pairs > 0) & ~full), *_kv_table(full), tile_of, sees]
    return tuple(table.to(device) for table in tables)


def _kv_table(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each block sees, `(1, H or 1, rows)`, and which, `(1, H or 1, rows, columns)`, seen first."""
    order = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return mask.sum(-1, dtype=torch.int32)[None], order[None].contiguous()


def _with_padding(mask: BlockMask, valid: torch.Tensor) -> BlockMask:
    """Return the mask of a batch with padding: no block counts as full, and keys have to be `valid` `(B, length)`."""
    inner = mask.mask_mod

    def mask_mod(batch, head, query_at, key_at):
        return inner(batch, head, query_at, key_at) & valid[batch, key_at]

    full, full_at, some = mask.full_kv_num_blocks, mask.full_kv_indices, mask.kv_num_blocks
    assert full is not None  # `_block_mask` gives both
    assert full_at is not None
    columns = torch.arange(mask.kv_indices.shape[-1], device=valid.device)
    seen = torch.zeros(mask.kv_indices.shape, dtype=torch.bool, device=valid.device)
    seen = seen.scatter(-1, mask.kv_indices.long(), columns < some[..., None])
    seen = seen | torch.zeros_like(seen).scatter(-1, full_at.long(), columns < full[..., None])
    count, at = _kv_table(seen[0])
    batch = len(valid)
    return BlockMask.from_kv_blocks(
        count.expand(batch, -1, -1).contiguous(),
        at.expand(batch, -1, -1, -1).contiguous(),
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask_mod,
        seq_lengths=mask.seq_lengths,
    )


__all__ = ["flex_block_attention", "flex_block_size", "flex_tables"]
