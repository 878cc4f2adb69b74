"""Which patches are masked, and the attention pattern of those that stay visible.

Masks are drawn by whole tiles, from a key alone: nothing here touches a random generator. A pattern is cut to the
visible patches (`visible_pattern`): tiles that hold none of them go, the others keep their links to each other. The
layers then run on so many tokens fewer, and every pair of tokens left sees each other exactly where the whole pattern
says so. Why one mask serves many images: docs/decisions/0011-masked-tiles.md.
"""

import hashlib
import struct
from dataclasses import replace

import torch

from .pattern_tables import BlockPattern, ordinary_tensors


@ordinary_tensors()
def draw_masked_patches(grid: tuple[int, int], tile_size: tuple[int, int], ratio: float, key: str) -> torch.Tensor:
    """Return which patches are masked, `(patches,)` bool in raster order, on the CPU.

    Each tile gets a 64-bit score from SHAKE-128 of the key; those with the lowest are masked. So a key means the same
    mask on every machine, in every process and in a second pass.

    Args:
        grid: Rows and columns of patches.
        tile_size: Of a tile in patches, (height, width); at the lower and right border tiles may be partial.
        ratio: Share of the tiles that is masked, rounded to whole tiles, but at least one and not all.
        key: What the draw depends on, a seed and a step for example.

    Raises:
        ValueError: A ratio outside (0, 1), or a grid of a single tile.
    """
    check_mask_ratio(ratio)
    (rows, columns), (height, width) = grid, tile_size
    tile_rows, tile_columns = -(-rows // height), -(-columns // width)
    num_tiles = tile_rows * tile_columns
    if num_tiles < 2:
        raise ValueError(
            f"`mask_tile_size`: expected at least two tiles of {tile_size} patches on the grid {grid}, so that one "
            "stays visible, got one; choose smaller tiles or larger images."
        )
    num_masked = min(max(round(ratio * num_tiles), 1), num_tiles - 1)
    digest = hashlib.shake_128(f"masked_tiles/{key}".encode()).digest(8 * num_tiles)
    scores = struct.unpack(f"<{num_tiles}Q", digest)
    masked = set(sorted(range(num_tiles), key=scores.__getitem__)[:num_masked])
    table = torch.tensor([tile in masked for tile in range(num_tiles)]).view(tile_rows, tile_columns)
    spread = table.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return spread[:rows, :columns].flatten()


def check_mask_ratio(ratio: float) -> None:
    """Refuse a share of masked tiles that leaves nothing to see or nothing to paint.

    Raises:
        ValueError: A ratio outside (0, 1).
    """
    if not 0 < ratio < 1:
        raise ValueError(f"`mask_ratio`: expected a share of the tiles in (0, 1), got {ratio}.")


@ordinary_tensors()
def visible_pattern(pattern: BlockPattern, visible: torch.Tensor) -> BlockPattern:
    """Return the pattern among some of the patches alone.

    Args:
        pattern: Of all patches of a grid.
        visible: `(patches,)` bool in raster order, on the CPU; at least one is true.

    Returns:
        A pattern on the same grid whose `order` holds the visible patches. Its tiles are those of `pattern` that hold
        any of them, in a row; a tile of which some patches are hidden is partial.
    """
    stays = visible[pattern.order]
    tile_of_patch = pattern.tile_of_patch[stays]
    tiles, renumbered = tile_of_patch.unique(return_inverse=True)
    count = len(tiles)
    number = torch.full((pattern.num_tiles + 1,), count)  # hidden tiles and unused slots: after all others
    number[tiles] = torch.arange(count)
    neighbours = number[pattern.neighbours[:, tiles]].sort(-1).values
    slots = max(1, int((neighbours < count).sum(-1).max()))
    neighbours = neighbours[..., :slots]
    return replace(
        pattern,
        tile_grid=(1, count),
        order=pattern.order[stays],
        tile_of_patch=renumbered,
        neighbours=neighbours.where(neighbours < count, -1),
        global_tiles=tuple(int(number[tile]) for tile in pattern.global_tiles if number[tile] < count),
        window_size=1,
    )


@ordinary_tensors()
def visible_patterns(patterns: tuple[BlockPattern, ...], visible: torch.Tensor) -> list[BlockPattern]:
    """Return `visible_pattern` of each layer's; layers of equal patterns share one.

    Raises:
        ValueError: No patch is visible.
    """
    if not bool(visible.any()):
        raise ValueError("`bool_masked_pos`: expected at least one visible patch, got a mask of all patches.")
    made: dict[str, BlockPattern] = {}
    for pattern in patterns:
        if pattern.name not in made:
            made[pattern.name] = visible_pattern(pattern, visible)
    return [made[pattern.name] for pattern in patterns]


__all__ = ["check_mask_ratio", "draw_masked_patches", "visible_pattern", "visible_patterns"]
