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
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from weakref import WeakValueDictionary

import torch

from .pattern_picture import svg_picture, text_picture
from .table_store import STORE, cached_tables, outside_modes

LAYOUTS = ("tiles", "raster")
# Compiled graphs hold names, and names follow from contents: patterns that are alive, and how to make others again.
_BY_NAME: WeakValueDictionary[str, "BlockPattern"] = WeakValueDictionary()
_ARGUMENTS: dict[str, tuple] = {}


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """Attention pattern of one layer on one grid.

    Attributes:
        grid: Rows and columns of patches.
        tile_grid: Rows and columns of tiles.
        num_global_tokens: Tokens in front of the patches that see and are seen by all.
        order: `(patches,)` int64, raster index of the patch at each tile-major position.
        tile_of_patch: `(patches,)` int64, tile of the patch at each tile-major position, ascending.
        neighbours: `(heads or 1, tiles, slots)` int64, the tiles each tile sees, ascending; -1 fills unused slots. The
            rows of global tiles are not used: they see every tile.
        global_tiles: Tiles that see and are seen by all, ascending; each is in every row of `neighbours`.
        window_size: Side of the local window in tiles; for pictures alone.
        tile_sizes: `(tiles,)` int64, patches in each tile.
        largest_tile: Patches in the largest tile.
        num_see_all: Tokens that see and are seen by all: global ones, and those in global tiles.
        density: Share of (query, key) pairs of tokens that attend, in (0, 1], global tokens included.
        is_full: Whether every token sees every token.
        is_raster: Whether tile-major order and raster order are the same.
        name: A digest of grid and tables, see `named_pattern`.
    """

    grid: tuple[int, int]
    tile_grid: tuple[int, int]
    num_global_tokens: int
    order: torch.Tensor
    tile_of_patch: torch.Tensor
    neighbours: torch.Tensor
    global_tiles: tuple[int, ...] = ()
    window_size: int = 1
    tile_sizes: torch.Tensor = field(init=False, repr=False)
    # numbers, not tensors: they are read while a graph is traced, when no tensor has a value
    largest_tile: int = field(init=False)
    num_see_all: int = field(init=False)
    density: float = field(init=False)
    is_full: bool = field(init=False)
    is_raster: bool = field(init=False)
    name: str = field(init=False)

    def __post_init__(self):
        sizes = torch.bincount(self.tile_of_patch, minlength=self.num_tiles)
        seen = torch.nn.functional.pad(sizes, (0, 1))[self.neighbours].sum(-1)  # -1 is the column of zeros
        seen[:, list(self.global_tiles)] = len(self.order)
        patches, num_global = len(self.order), self.num_global_tokens
        pairs = (seen * sizes).sum(-1).to(torch.float64).mean().item()
        facts = {
            "tile_sizes": sizes,
            "largest_tile": int(sizes.max()),
            "num_see_all": num_global + int(sizes[list(self.global_tiles)].sum()),
            "density": (pairs + 2 * num_global * patches + num_global**2) / self.num_tokens**2,
            "is_full": bool((seen == patches).all()),
            "is_raster": bool((self.order == torch.arange(patches)).all()),
            "name": self._digest(),
        }
        for name, fact in facts.items():
            object.__setattr__(self, name, fact)
        _BY_NAME[self.name] = self

    def __setstate__(self, state: dict):
        self.__dict__.update(state)  # unpickled and copied patterns have names too
        self._keep()

    def _keep(self) -> "BlockPattern":
        """Let a pattern that no arguments make again be found by its name for as long as the store holds it."""
        _BY_NAME[self.name] = self
        STORE.put(("pattern", self.name), self)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, and about those of what is derived from them."""
        tables = self.order, self.tile_of_patch, self.neighbours, self.tile_sizes
        derived = len(self.neighbours) * self.num_tiles * (self.num_tiles + 1000)  # `tile_mask` and `runs`
        return sum(one.nbytes for one in tables) + derived

    def _digest(self) -> str:
        sizes = self.grid, self.tile_grid, self.num_global_tokens, self.global_tiles, tuple(self.neighbours.shape)
        digest = hashlib.sha256(repr(sizes).encode())
        for table in (self.order, self.tile_of_patch, self.neighbours):
            digest.update(struct.pack(f"<{table.numel()}q", *table.flatten().tolist()))
        return digest.hexdigest()[:32]

    @outside_modes
    def with_neighbours(self, neighbours: torch.Tensor) -> "BlockPattern":
        """Return this pattern with another table, for example a plan for each head.

        Args:
            neighbours: `(heads or 1, tiles, slots)` int64, tiles in any order, -1 in unused slots. Global tiles are
                added where they are missing.

        Raises:
            ValueError: A table of another shape or type, with a tile that does not exist or comes twice in a row, or
                with a tile that would see nothing.
        """
        if neighbours.ndim != 3 or neighbours.shape[1] != self.num_tiles or neighbours.dtype != torch.int64:
            raise ValueError(
                f"`neighbours`: expected int64 (heads or 1, {self.num_tiles} tiles, slots), got {neighbours.dtype} "
                f"{tuple(neighbours.shape)}."
            )
        rows = [[[tile for tile in row if tile != -1] for row in head] for head in neighbours.tolist()]
        if self.num_global_tokens + len(self.global_tiles) == 0 and not all(row for head in rows for row in head):
            raise ValueError("`neighbours`: expected a tile for each to see, as nothing is global; got an empty row.")
        for row in (row for head in rows for row in head):
            if len(set(row)) < len(row) or not set(row) <= set(range(self.num_tiles)):
                raise ValueError(f"`neighbours`: expected different tiles below {self.num_tiles}, got {row}.")
        table = _table([[{*row, *self.global_tiles} for row in head] for head in rows])
        return replace(self, neighbours=table)._keep()

    @property
    def num_tiles(self) -> int:
        """Number of tiles."""
        return self.tile_grid[0] * self.tile_grid[1]

    @property
    def num_tokens(self) -> int:
        """Number of tokens, global ones included."""
        return self.num_global_tokens + self.grid[0] * self.grid[1]

    @cached_property
    @outside_modes
    def tile_mask(self) -> torch.Tensor:
        """`(heads or 1, tiles, tiles)` bool, true where the row's tile sees the column's."""
        heads, tiles, _ = self.neighbours.shape
        # one column more takes the unused slots, and is dropped
        mask = torch.zeros(heads, tiles, tiles + 1, dtype=torch.bool, device=self.neighbours.device)
        mask.scatter_(2, self.neighbours.where(self.neighbours >= 0, tiles), True)
        mask[:, list(self.global_tiles)] = True
        return mask[..., :tiles]

    @cached_property
    @outside_modes
    def runs(self) -> list[list[tuple[int, int, list[tuple[int, int]]]]]:
        """For each head of the table, rows of queries and the keys they see as intervals of token positions.

        A row is (first query, end, [(first key, end), ...]). Neighbouring tiles lie one behind the other in memory, so
        a window of 3x3 tiles is three intervals. The first row is that of the global tokens, if there are any.
        """
        ends = (self.num_global_tokens + self.tile_sizes.cumsum(0)).tolist()
        bounds = list(zip([self.num_global_tokens, *ends[:-1]], ends, strict=True))
        everything = [(0, self.num_tokens)]
        heads = []
        for table in self.neighbours.tolist():
            rows = [(0, self.num_global_tokens, everything)] if self.num_global_tokens else []
            for tile, seen in enumerate(table):
                intervals = [(0, self.num_global_tokens)] if self.num_global_tokens else []
                for start, end in (bounds[other] for other in seen if other >= 0):
                    if intervals and intervals[-1][1] == start:
                        intervals[-1] = (intervals[-1][0], end)
                    else:
                        intervals.append((start, end))
                rows.append((*bounds[tile], everything if tile in self.global_tiles else intervals))
            heads.append(rows)
        return heads

    def levels(self, tile: int, head: int = 0) -> list[str]:
        """Return how a tile sees each: `"query"` itself, `"global"`, `"local"`, `"random"`, or `""` not at all."""
        if not 0 <= tile < self.num_tiles:
            raise ValueError(f"`tile`: expected 0 to {self.num_tiles - 1}, got {tile}.")
        columns, reach = self.tile_grid[1], self.window_size // 2
        found = []
        for other, sees in enumerate(self.tile_mask[head % len(self.neighbours), tile].tolist()):
            distance = max(abs(other // columns - tile // columns), abs(other % columns - tile % columns))
            if other == tile:
                found.append("query")
            elif not sees:
                found.append("")
            elif other in self.global_tiles or tile in self.global_tiles:
                found.append("global")
            else:
                found.append("local" if distance <= reach else "random")
        return found

    def picture(self, tile: int | None = None) -> str:
        """Return a picture of what a tile sees, one character for each tile of the image.

        `Q` is the tile that looks, by default the middle one, `G` a global tile, `#` one in its window, `r` a random
        one, `.` one it does not see. Where heads have plans of their own, it is the first head's.
        """
        return text_picture(self.levels(self._middle if tile is None else tile), self.tile_grid[1])

    def svg(self, tile: int | None = None) -> str:
        """Return an SVG of what a tile sees, by default the middle one, and of which tile sees which."""
        levels = self.levels(self._middle if tile is None else tile)
        table = [self.levels(one) for one in range(self.num_tiles)]
        return svg_picture(levels, self.tile_grid[1], table, self._title)

    def _repr_svg_(self) -> str:
        return self.svg()  # what a notebook shows

    def __str__(self) -> str:
        """Return the grid, the density and the picture of the middle tile."""
        return f"{self._title}\n{self.picture()}"

    @property
    def _middle(self) -> int:
        rows, columns = self.tile_grid
        return (rows // 2) * columns + columns // 2

    @property
    def _title(self) -> str:
        return (
            f"{self.grid[0]}x{self.grid[1]} patches in {self.tile_grid[0]}x{self.tile_grid[1]} tiles, "
            f"{self.num_global_tokens} global tokens, density {self.density:.3f}"
        )

    def token_mask(self) -> torch.Tensor:
        """Return the dense mask of the pattern, the oracle of every implementation.

        Returns:
            `(heads or 1, tokens, tokens)` bool, true where the query (row) sees the key (column), tile-major order.
        """
        patches = self.tile_mask[:, self.tile_of_patch][:, :, self.tile_of_patch]
        return torch.nn.functional.pad(patches, (self.num_global_tokens, 0, self.num_global_tokens, 0), value=True)


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


def named_pattern(name: str) -> BlockPattern:
    """Return the pattern of that name.

    Functions that `torch.compile` is to run once, while tracing, take a pattern's name: a string is a constant to it.

    Raises:
        ValueError: No such pattern has been made in this process, or one with a table of its own too long ago.
    """
    found = _BY_NAME.get(name)
    if found is None and name in _ARGUMENTS:
        found = _build_pattern(*_ARGUMENTS[name])
    if found is None:
        raise ValueError(
            f"`pattern`: expected one that this process has made, got {name!r}; call the model's `attention_patterns` "
            "for the image size that the graph was exported with."
        )
    return found


@torch.compiler.assume_constant_result
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
    """Return the pattern of one layer, cached.

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

    return _build_pattern(
        height,
        width,
        layout,
        tile_size,
        block_size,
        window_size,
        num_random_blocks,
        num_global_tiles,
        num_global_tokens,
        seed,
        layer,
    )


@cached_tables
def _build_pattern(
    height: int,
    width: int,
    layout: str,
    tile_size: tuple[int, int],
    block_size: int,
    window_size: int,
    num_random_blocks: int,
    num_global_tiles: int,
    num_global_tokens: int,
    seed: int,
    layer: int,
) -> BlockPattern:
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
    pattern = BlockPattern(
        grid=(height, width),
        tile_grid=(rows, columns),
        num_global_tokens=num_global_tokens,
        order=order,
        tile_of_patch=tile_of_raster[order],
        neighbours=_table([table]),
        global_tiles=tuple(global_tiles),
        window_size=window_size,
    )
    _ARGUMENTS[pattern.name] = (
        height,
        width,
        layout,
        tile_size,
        block_size,
        window_size,
        num_random_blocks,
        num_global_tiles,
        num_global_tokens,
        seed,
        layer,
    )
    return pattern


def _table(heads: list[list[set[int]]]) -> torch.Tensor:
    """`(heads, tiles, slots)` int64, rows ascending and -1 in unused slots."""
    slots = max(1, *(len(row) for head in heads for row in head))
    rows = [[sorted(row) + [-1] * (slots - len(row)) for row in head] for head in heads]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


__all__ = ["LAYOUTS", "BlockPattern", "block_pattern", "named_pattern", "random_tiles"]
