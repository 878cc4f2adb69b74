"""What a model needs for a grid of patches, made once and kept: its patterns, the order of tokens, rotary tables.

Patterns hang on the model, what is derived from a pattern hangs on the pattern: tensors that go when the model goes.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .bigbird_positions import rotary_tables, with_global_tokens
from .configuration_bigbird_vit import BigBirdViTConfig
from .pattern_tables import BlockPattern

MAX_BYTES = 2**30


def pattern_settings(config: BigBirdViTConfig, rows: int, columns: int) -> dict[str, Any]:
    """Return what `block_pattern` takes beside the grid and the layer."""
    full = config.attention_type == "original_full"
    return {
        "layout": "tiles" if full else config.attention_layout,
        "tile_size": (rows, columns) if full else config.tile_size_hw,
        "block_size": config.block_size,
        "window_size": config.window_size,
        "num_random_blocks": 0 if full else config.num_random_blocks,
        "num_global_tiles": 0 if full else config.num_global_tiles,
        "num_global_tokens": 1 + config.num_register_tokens,
        "seed": config.attention_seed,
    }


class GridPlan(NamedTuple):
    """What all layers share on one grid and device.

    Attributes:
        kept: `(tokens,)` int64, the tokens that the pattern is of among all of the grid, CLS and registers first, in
            raster order; None where it leaves out none.
        to_tiles: `(tokens,)` int64, of those that are kept from raster order to tile-major order; None where the two
            are the same.
        to_raster: `(tokens,)` int64, and back.
        rotary: Cosines and sines `(1, 1, tokens, head_dim)` in tile-major order, where every patch is valid; None
            without rotary positions.
    """

    kept: torch.Tensor | None
    to_tiles: torch.Tensor | None
    to_raster: torch.Tensor | None
    rotary: tuple[torch.Tensor, torch.Tensor] | None


def grid_plan(pattern: BlockPattern, head_dim: int, theta: float | None, device: torch.device) -> GridPlan:
    """Return the plan of a pattern's grid; without `theta` there are no rotary positions."""
    kept = to_tiles = to_raster = None
    front = torch.arange(pattern.num_global_tokens)
    patches, rank = pattern.order.sort()
    if len(patches) < pattern.grid[0] * pattern.grid[1]:
        kept = torch.cat([front, patches + len(front)]).to(device)
    if not pattern.is_raster:
        to_raster = torch.cat([front, rank + len(front)])
        to_tiles, to_raster = to_raster.argsort().to(device), to_raster.to(device)
    rotary = rotary_in_order(pattern, kept, to_tiles, None, head_dim, theta, device)
    return GridPlan(kept, to_tiles, to_raster, rotary)


def rotary_in_order(
    pattern: BlockPattern,
    kept: torch.Tensor | None,
    to_tiles: torch.Tensor | None,
    valid: torch.Tensor | None,
    head_dim: int,
    theta: float | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return `rotary_tables` `(batch or 1, 1, tokens, head_dim)`, global tokens first, in tile-major order.

    None without `theta`: there are no rotary positions. Patches that are not `kept` count for where the others are.
    """
    if theta is None:
        return None
    tables = rotary_tables(head_dim, theta, valid, *pattern.grid, device)
    cos, sin = with_global_tokens(tables, pattern.num_global_tokens)
    return reorder(reorder(cos, kept, 2), to_tiles, 2), reorder(reorder(sin, kept, 2), to_tiles, 2)


def reorder(states: torch.Tensor, index: torch.Tensor | None, dim: int) -> torch.Tensor:
    """Return the states with `index` selected along `dim`, or as they are without one."""
    return states if index is None else states.index_select(dim, index)


class PatternCache:
    """A model's patterns, those of all layers for each grid, up to `max_bytes` with what is derived from them.

    What was used longest ago goes first, the latest is always kept. A copy of a cache is empty: it makes its own.
    """

    def __init__(self, max_bytes: int = MAX_BYTES):
        self.max_bytes = max_bytes
        self._patterns: OrderedDict[Any, tuple[BlockPattern, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return PatternCache, (self.max_bytes,)

    def __len__(self) -> int:
        return len(self._patterns)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(one.nbytes for patterns in self._patterns.values() for one in set(patterns))

    def get(self, key: Any, make: Callable[[], list[BlockPattern]]) -> tuple[BlockPattern, ...]:
        """Return the patterns of a key, made by `make` if there are none; layers of equal patterns share one."""
        with self._lock:
            if key not in self._patterns:
                made: dict[str, BlockPattern] = {}
                self._patterns[key] = tuple(made.setdefault(one.name, one) for one in make())
                while len(self._patterns) > 1 and self.nbytes > self.max_bytes:
                    self._patterns.popitem(last=False)
            self._patterns.move_to_end(key)
            return self._patterns[key]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._patterns.clear()


__all__ = ["GridPlan", "PatternCache", "grid_plan", "pattern_settings", "reorder", "rotary_in_order"]
