"""Which block of tokens sees which: BigBird's global, local and random levels on a 2-D grid of patches.

The pattern is data: index tables that follow from (seed, layer, grid) alone. They can be printed and tested without a
model, and nothing here touches a random generator.

Words: a *tile* is a rectangle of patches and plays the part of BigBird's block. *Global* tokens (CLS and registers)
stand before the patches; they see every token and every token sees them, and so do *global tiles*. Each other tile
sees the *window* of tiles around it and a few *random* tiles beyond. Patches are ordered tile-major: tile after tile
in raster order, and in raster order within a tile, so that a tile's tokens are neighbours in memory. Tiles at the
lower and right border may be partial.

Two layouts. `tiles`: rectangles on the grid, window of tiles in both directions, global tiles only if asked for.
`raster`: BigBird's own ITC form, blocks of consecutive patches in raster order, the first and the last of them global,
a window along the sequence. CLS and registers are no part of the blocks in either: they stand in front, as ETC's do.

Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences" (arXiv 2007.14062), section 2; the 2-D window
after Zhang et al. 2021, "Multi-Scale Vision Longformer" (arXiv 2103.15358). BigBird's blocks are 1-D runs of tokens;
here they are 2-D tiles, because a run of 64 patches on a grid 64 wide is a strip one patch high.
"""

import hashlib
import heapq
import math
import struct
from itertools import pairwise

import torch

from .pattern_tables import BlockPattern, neighbour_table, ordinary_tensors

LAYOUTS = ("tiles", "raster")


def random_tiles(
    seed: int, layer: int, head: int, row: int, excluded: set[int], num_tiles: int, count: int
) -> list[int]:
    """Return the random tiles that one tile sees, the same on every machine and release.

    Every tile gets a 64-bit score from SHAKE-128 of the key (seed, layer, head, row); the `count` tiles with the
    lowest scores win, ties going to the lower tile.

    Args:
        seed: The architecture's `attention_seed`.
        layer: Index of the layer.
        head: Index of the head, 0 when all heads share a plan.
        row: The tile that looks.
        excluded: Tiles it sees anyway.
        num_tiles: Tiles in all.
        count: How many to choose; all that are left if there are fewer.

    Returns:
        The chosen tiles, ascending.
    """
    if count == 0 or len(excluded) == num_tiles:
        return []
    key = f"bigbird_vit/{seed}/{layer}/{head}/{row}".encode()
    scores = struct.unpack(f"<{num_tiles}Q", hashlib.shake_128(key).digest(8 * num_tiles))
    best = heapq.nsmallest(count + len(excluded), range(num_tiles), key=scores.__getitem__)
    return sorted([tile for tile in best if tile not in excluded][:count])


def spread_tiles(count: int, rows: int, columns: int) -> list[int]:
    """Return `count` tiles (all, if there are fewer) of a grid of tiles, ascending, spread over rows and columns.

    They stand in rows as far from each other as in a row, as many in each row as in any other or one more.
    """
    count = min(count, rows * columns)
    if count == 0:
        return []
    lines = min(max(round(math.sqrt(count * rows / columns)), -(-count // columns), 1), rows, count)
    ends = [line * count // lines for line in range(lines + 1)]
    return [
        (2 * line + 1) * rows // (2 * lines) * columns + (2 * index + 1) * columns // (2 * (end - start))
        for line, (start, end) in enumerate(pairwise(ends))
        for index in range(end - start)
    ]


@ordinary_tensors()
def block_pattern(
    height: int,
    width: int,
    *,
    layout: str = "tiles",
    tile_size: tuple[int, int] = (8, 8),
    block_size: int = 64,
    window_size: int = 3,
    num_random_blocks: int = 3,
    num_global_tiles: int = 0,
    num_global_tokens: int = 1,
    seed: int = 0,
    layer: int = 0,
) -> BlockPattern:
    """Return the pattern of one layer.

    Args:
        height: Rows of patches.
        width: Columns of patches.
        layout: `"tiles"`, rectangles on the grid, or `"raster"`, runs of patches in raster order.
        tile_size: Tile in patches, (height, width); `tiles` only.
        block_size: Patches in a block; `raster` only.
        window_size: Side of the window in tiles, odd.
        num_random_blocks: Random tiles for each tile, none of them in its window or global.
        num_global_tiles: Tiles that see and are seen by all, spread evenly over the tiles; `tiles` only, for in
            `raster` the first and the last block are global.
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
        ("block_size", block_size, 1),
        ("window_size", window_size, 1),
        ("num_random_blocks", num_random_blocks, 0),
        ("num_global_tiles", num_global_tiles, 0),
        ("num_global_tokens", num_global_tokens, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}`: expected at least {least}, got {value}.")
    if window_size % 2 == 0:
        raise ValueError(f"`window_size`: expected an odd number of tiles, got {window_size}.")
    if layout not in LAYOUTS:
        raise ValueError(f"`layout`: expected one of {LAYOUTS}, got {layout!r}.")

    raster = torch.arange(height * width)
    if layout == "raster":
        rows, columns = 1, -(-height * width // block_size)
        tile_of_raster = raster.div(block_size, rounding_mode="floor")
        global_tiles = sorted({0, columns - 1})
    else:
        rows, columns = -(-height // tile_size[0]), -(-width // tile_size[1])
        tile_rows = raster.div(width * tile_size[0], rounding_mode="floor")
        tile_columns = (raster % width).div(tile_size[1], rounding_mode="floor")
        tile_of_raster = tile_rows * columns + tile_columns
        global_tiles = spread_tiles(num_global_tiles, rows, columns)
    order = torch.sort(tile_of_raster, stable=True).indices

    reach, num_tiles = window_size // 2, rows * columns
    table = []
    for tile in range(num_tiles):
        row, column = divmod(tile, columns)
        seen = {
            near_row * columns + near_column
            for near_row in range(max(0, row - reach), min(rows, row + reach + 1))
            for near_column in range(max(0, column - reach), min(columns, column + reach + 1))
        }
        seen.update(global_tiles)
        seen.update(random_tiles(seed, layer, 0, tile, seen, num_tiles, num_random_blocks))
        table.append(seen)
    return BlockPattern(
        grid=(height, width),
        tile_grid=(rows, columns),
        num_global_tokens=num_global_tokens,
        order=order,
        tile_of_patch=tile_of_raster[order],
        neighbours=neighbour_table([table]),
        global_tiles=tuple(global_tiles),
        window_size=window_size,
    )


__all__ = ["LAYOUTS", "BlockPattern", "block_pattern", "random_tiles"]
