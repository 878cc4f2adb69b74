"""The order in which a model's layers hold the patches, and back to raster order; what torch.compile can trace of it.

A compiled graph knows patterns by name: constants come from functions of the name, tables from operators.
"""

import torch

from .bigbird_pattern import BlockPattern, named_pattern
from .block_sparse_attention import NAMESPACE
from .table_store import cached_tables


@torch.compiler.assume_constant_result
def misfit(names: str, layers: int, rows: int, columns: int, num_global: int) -> str:
    """What was expected of a model's patterns and what they are; empty if they fit. Names are joined by slashes."""
    patterns = [named_pattern(name) for name in names.split("/")] if names else []
    found = [(one.grid, one.num_global_tokens) for one in patterns]
    if found != [((rows, columns), num_global)] * layers:
        return f"{layers} patterns of grid {(rows, columns)} with {num_global} global tokens, got {found}"
    if not all(torch.equal(patterns[0].order, one.order) for one in patterns[1:]):
        return "one order of patches in all layers, got different tiles"
    return ""


@torch.compiler.assume_constant_result
def is_raster(name: str) -> bool:
    """Return whether the named pattern holds patches in raster order."""
    return named_pattern(name).is_raster


def patch_order(pattern: BlockPattern, device: torch.device) -> torch.Tensor:
    """Return the pattern's `order` on the device."""
    if torch.compiler.is_compiling():
        return _patch_order(pattern.name, device)
    return _cached_order(pattern, device)


@torch.library.custom_op(f"{NAMESPACE}::patch_order", mutates_args=())
def _patch_order(name: str, device: torch.device) -> torch.Tensor:
    return _cached_order(named_pattern(name), device).clone()  # a compiler may write over what an operator returns


@_patch_order.register_fake
def _patch_order_fake(name, device):
    return torch.empty(len(named_pattern(name).order), dtype=torch.int64, device=device)


@cached_tables
def _cached_order(pattern: BlockPattern, device: torch.device) -> torch.Tensor:
    return pattern.order.to(device)


def reorder(states: torch.Tensor, index: torch.Tensor | None, dim: int) -> torch.Tensor:
    """Return the states with `index` selected along `dim`, or as they are without one."""
    return states if index is None else states.index_select(dim, index)


__all__ = ["is_raster", "misfit", "patch_order", "reorder"]
