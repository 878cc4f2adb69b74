"""Which block of tokens sees which: BigBird's global, local and random levels on a 2-D grid of patches.

The pattern is data: index tables that follow from (seed, layer, grid) alone. They can be printed and tested without a
model, and nothing here touches a random generator.

Words: a *tile* is a rectangle of patches and plays the part of BigBird's block. *Global* tokens (CLS and registers)
stand before the patches; they see every token and every token sees them. Each tile sees the *window* of tiles around
it and a few *random* tiles beyond. Patches are ordered tile-major: tile after tile in raster order, and in raster
order within a tile, so that a tile's tokens are neighbours in memory. Tiles at the lower and right border may be
partial.

Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences" (arXiv 2007.14062), section 2; the 2-D window
after Zhang et al. 2021, "Multi-Scale Vision Longformer" (arXiv 2103.15358). BigBird's blocks are 1-D runs of tokens;
here they are 2-D tiles, because a run of 64 patches on a grid 64 wide is a strip one patch high.
"""

import hashlib
import heapq
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """Attention pattern of one layer on one grid.

    Attributes:
        grid: Rows and columns of patches.
        tile_grid: Rows and columns of tiles.
        num_global_tokens: Tokens in front of the patches that see and are seen by all.
        order: `(patches,)` int64, raster index of the patch at each tile-major position.
        tile_of_patch: `(patches,)` int64, tile of the patch at each tile-major position, ascending.
        neighbours: `(heads or 1, tiles, slots)` int64, the tiles each tile sees, ascending; -1 fills unused slots.
    """

    grid: tuple[int, int]
    tile_grid: tuple[int, int]
    num_global_tokens: int
    order: torch.Tensor
    tile_of_patch: torch.Tensor
    neighbours: torch.Tensor

    @property
    def num_tiles(self) -> int:
        """Number of tiles."""
        return self.tile_grid[0] * self.tile_grid[1]

    @property
    def num_tokens(self) -> int:
        """Number of tokens, global ones included."""
        return self.num_global_tokens + self.grid[0] * self.grid[1]

    @cached_property
    def tile_sizes(self) -> torch.Tensor:
        """`(tiles,)` int64, patches in each tile."""
        return torch.bincount(self.tile_of_patch, minlength=self.num_tiles)

    @cached_property
    def tile_mask(self) -> torch.Tensor:
        """`(heads or 1, tiles, tiles)` bool, true where the row's tile sees the column's."""
        heads, tiles, _ = self.neighbours.shape
        # one column more takes the unused slots, and is dropped
        mask = torch.zeros(heads, tiles, tiles + 1, dtype=torch.bool, device=self.neighbours.device)
        mask.scatter_(2, self.neighbours.where(self.neighbours >= 0, tiles), True)
        return mask[..., :tiles]

    @cached_property
    def is_full(self) -> bool:
        """Whether every token sees every token."""
        return bool(self.tile_mask.all())

    @cached_property
    def is_raster(self) -> bool:
        """Whether tile-major order and raster order are the same."""
        return bool((self.order == torch.arange(len(self.order), device=self.order.device)).all())

    @cached_property
    def density(self) -> float:
        """Share of (query, key) pairs of tokens that attend, in (0, 1], global tokens included."""
        sizes = self.tile_sizes.to(torch.float64)
        pairs = torch.einsum("htu,t,u->h", self.tile_mask.to(torch.float64), sizes, sizes).mean().item()
        patches, num_global = len(self.order), self.num_global_tokens
        return (pairs + 2 * num_global * patches + num_global**2) / self.num_tokens**2

    def token_mask(self) -> torch.Tensor:
        """Return the dense mask of the pattern, the oracle of every implementation.

        Returns:
            `(heads or 1, tokens, tokens)` bool, true where the query (row) sees the key (column), tile-major order.
        """
        patches = self.tile_mask[:, self.tile_of_patch][:, :, self.tile_of_patch]
        return torch.nn.functional.pad(patches, (self.num_global_tokens, 0, self.num_global_tokens, 0), value=True)


def random_tiles(seed: int, layer: int, head: int, row: int, candidates: list[int], count: int) -> list[int]:
    """Return the random tiles that one tile sees, the same on every machine and release.

    Every tile gets a 64-bit score from SHAKE-128 of the key (seed, layer, head, row); the `count` candidates with the
    lowest scores win, ties going to the lower tile.

    Args:
        seed: The architecture's `attention_seed`.
        layer: Index of the layer.
        head: Index of the head, 0 when all heads share a plan.
        row: The tile that looks.
        candidates: Tiles to choose from, ascending.
        count: How many to choose; all candidates if there are fewer.

    Returns:
        The chosen tiles, ascending.
    """
    if count == 0 or not candidates:
        return []
    key = f"bigbird_vit/{seed}/{layer}/{head}/{row}".encode()
    num_scores = candidates[-1] + 1
    scores = struct.unpack(f"<{num_scores}Q", hashlib.shake_128(key).digest(8 * num_scores))
    return sorted(heapq.nsmallest(count, candidates, key=lambda tile: (scores[tile], tile)))


@lru_cache(maxsize=512)
def tile_pattern(
    height: int,
    width: int,
    *,
    tile_size: tuple[int, int] = (8, 8),
    window_size: int = 3,
    num_random_blocks: int = 3,
    num_global_tokens: int = 1,
    seed: int = 0,
    layer: int = 0,
) -> BlockPattern:
    """Return the 2-D pattern of one layer, cached.

    Args:
        height: Rows of patches.
        width: Columns of patches.
        tile_size: Tile in patches, (height, width).
        window_size: Side of the window in tiles, odd.
        num_random_blocks: Random tiles for each tile, none of them in its window.
        num_global_tokens: CLS and registers, in front of the patches.
        seed: Seed of the random tiles.
        layer: Index of the layer; layers draw different random tiles.

    Raises:
        ValueError: An argument out of range.
    """
    for name, value, least in (
        ("height", height, 1),
        ("width", width, 1),
        ("tile_size", min(tile_size), 1),
        ("window_size", window_size, 1),
        ("num_random_blocks", num_random_blocks, 0),
        ("num_global_tokens", num_global_tokens, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}`: expected at least {least}, got {value}.")
    if window_size % 2 == 0:
        raise ValueError(f"`window_size`: expected an odd number of tiles, got {window_size}.")

    # the tables are made once and used in training and inference: never let them become inference tensors
    with torch.inference_mode(False), torch.device("cpu"):
        rows, columns = -(-height // tile_size[0]), -(-width // tile_size[1])
        patch_rows = torch.arange(height).div(tile_size[0], rounding_mode="floor")
        patch_columns = torch.arange(width).div(tile_size[1], rounding_mode="floor")
        tile_of_raster = (patch_rows[:, None] * columns + patch_columns[None, :]).flatten()
        order = torch.sort(tile_of_raster, stable=True).indices

        reach = window_size // 2
        table = []
        for tile in range(rows * columns):
            row, column = divmod(tile, columns)
            window = {
                near_row * columns + near_column
                for near_row in range(max(0, row - reach), min(rows, row + reach + 1))
                for near_column in range(max(0, column - reach), min(columns, column + reach + 1))
            }
            beyond = [other for other in range(rows * columns) if other not in window]
            table.append(sorted(window) + random_tiles(seed, layer, 0, tile, beyond, num_random_blocks))
        slots = max(map(len, table))
        neighbours = torch.tensor([sorted(seen) + [-1] * (slots - len(seen)) for seen in table])[None]
        return BlockPattern(
            grid=(height, width),
            tile_grid=(rows, columns),
            num_global_tokens=num_global_tokens,
            order=order,
            tile_of_patch=tile_of_raster[order],
            neighbours=neighbours,
        )


__all__ = ["BlockPattern", "random_tiles", "tile_pattern"]
