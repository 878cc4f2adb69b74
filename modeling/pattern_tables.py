"""A block pattern as data: its tables, the facts that follow from them, and what is derived from it and kept with it.

What the words mean, and how a pattern is made, is in `bigbird_pattern.py`.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from .pattern_picture import svg_picture, text_picture

# A compiler hands tensors and literals alone to what it runs while tracing: there a tensor with a number stands for a
# pattern. Weakly: nothing is kept alive here.
_NUMBERS = count()
_ALIVE: WeakValueDictionary[int, "BlockPattern"] = WeakValueDictionary()


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors that serve training, inference and tracing alike, whatever mode of torch's is on meanwhile.

    Tables are kept, and may be asked for first under inference, a default device, a trace or on fake tensors.
    """
    with (
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch.inference_mode(False),
    ):
        yield


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """Attention pattern of one layer on one grid.

    Attributes:
        grid: Rows and columns of patches.
        tile_grid: Rows and columns of tiles.
        num_global_tokens: Tokens in front of the patches that see and are seen by all.
        order: `(patches,)` int64, raster index of the patch at each tile-major position; where some patches are left
            out (`visible_patches.py`), of those that stay.
        tile_of_patch: `(patches,)` int64, tile of the patch at each tile-major position, ascending.
        neighbours: `(heads or 1, tiles, slots)` int64, the tiles each tile sees, ascending; -1 fills unused slots. The
            rows of global tiles are not used: they see every tile.
        global_tiles: Tiles that see and are seen by all, ascending; each is in every row of `neighbours`.
        window_size: Side of the local window in tiles; for pictures alone.
        num_tiles: Number of tiles.
        num_tokens: Number of tokens, global ones included.
        tile_sizes: `(tiles,)` int64, patches in each tile.
        largest_tile: Patches in the largest tile.
        num_see_all: Tokens that see and are seen by all: global ones, and those in global tiles.
        density: Share of (query, key) pairs of tokens that attend, in (0, 1], global tokens included.
        is_full: Whether every token sees every token.
        is_raster: Whether tile-major order and raster order are the same.
        order_name: A digest of grid and order: of patterns that are alike in it, tokens are held alike.
        name: A digest of grid and tables: patterns of one name are equal.
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
    # attributes, and no tensors: they are read while a graph is traced, of a constant, and no tensor has a value then
    num_tiles: int = field(init=False)
    num_tokens: int = field(init=False)
    largest_tile: int = field(init=False)
    num_see_all: int = field(init=False)
    density: float = field(init=False)
    is_full: bool = field(init=False)
    is_raster: bool = field(init=False)
    order_name: str = field(init=False)
    name: str = field(init=False)
    _kept: dict[tuple, Any] = field(init=False, repr=False)
    _handle: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self):
        patches, num_global = len(self.order), self.num_global_tokens
        num_tiles, num_tokens = self.tile_grid[0] * self.tile_grid[1], num_global + patches
        sizes = torch.bincount(self.tile_of_patch, minlength=num_tiles)
        seen = torch.nn.functional.pad(sizes, (0, 1))[self.neighbours].sum(-1)  # -1 is the column of zeros
        seen[:, list(self.global_tiles)] = patches
        pairs = (seen * sizes).sum(-1).to(torch.float64).mean().item()
        sizes_of = self.tile_grid, num_global, self.global_tiles, tuple(self.neighbours.shape)
        order_name = _digest(repr(self.grid), self.order)
        facts = {
            "tile_sizes": sizes,
            "num_tiles": num_tiles,
            "num_tokens": num_tokens,
            "largest_tile": int(sizes.max()),
            "num_see_all": num_global + int(sizes[list(self.global_tiles)].sum()),
            "density": (pairs + 2 * num_global * patches + num_global**2) / num_tokens**2,
            "is_full": bool((seen == patches).all()),
            "is_raster": bool((self.order[1:] > self.order[:-1]).all()),
            "order_name": order_name,
            "name": _digest(f"{order_name} {sizes_of}", self.tile_of_patch, self.neighbours),
        }
        for name, fact in facts.items():
            object.__setattr__(self, name, fact)

        self._open_store()

    def _open_store(self) -> None:
        number = next(_NUMBERS)
        _ALIVE[number] = self
        object.__setattr__(self, "_handle", torch.tensor(number, device="cpu"))
        object.__setattr__(self, "_kept", {})

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_handle", "_kept")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        with ordinary_tensors():
            self._open_store()  # a copy makes its own tables

    @property
    def nbytes(self) -> int:
        """Bytes of the tables and of what is derived from them."""
        tables = self.order, self.tile_of_patch, self.neighbours, self.tile_sizes, *self._kept.values()
        return sum(map(_size_of, tables))

    @ordinary_tensors()
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
        table = neighbour_table([[{*row, *self.global_tiles} for row in head] for head in rows])
        return replace(self, neighbours=table)

    @cached_property
    @ordinary_tensors()
    def tile_mask(self) -> torch.Tensor:
        """`(heads or 1, tiles, tiles)` bool, true where the row's tile sees the column's."""
        heads, tiles, _ = self.neighbours.shape
        # one column more takes the unused slots, and is dropped
        mask = torch.zeros(heads, tiles, tiles + 1, dtype=torch.bool, device=self.neighbours.device)
        mask.scatter_(2, self.neighbours.where(self.neighbours >= 0, tiles), True)
        mask[:, list(self.global_tiles)] = True
        return mask[..., :tiles]

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


def derived(pattern: BlockPattern, make: Callable, *arguments) -> Any:
    """Return `make(pattern, *arguments)`, made once and kept with the pattern: tables for a device, for example.

    Args:
        pattern: To `torch.compile` it and the result are constants, and the pattern's name is guarded.
        make: A pure function that returns a tensor or a tuple.
        arguments: Hashable ones.
    """
    if torch.compiler.is_dynamo_compiling():
        return _made(pattern._handle, pattern.name, make, *arguments)[0]
    # no functions: torch 2.11 guards those in a constant's attributes
    key = (make.__module__, make.__name__, *arguments)
    if key not in pattern._kept:
        with ordinary_tensors():
            pattern._kept[key] = make(pattern, *arguments)
    return pattern._kept[key]


def constant(pattern: BlockPattern) -> BlockPattern:
    """Return the pattern; to `torch.compile` it is a constant from here on, and its name is guarded."""
    return _itself(pattern._handle, pattern.name) if torch.compiler.is_dynamo_compiling() else pattern


@torch.compiler.assume_constant_result
def _made(handle: torch.Tensor, name: str, make: Callable, *arguments) -> tuple[Any]:
    # in a tuple: constants that are tensors would all have one name in a graph
    return (derived(_ALIVE[int(handle)], make, *arguments),)


@torch.compiler.assume_constant_result
def _itself(handle: torch.Tensor, name: str) -> BlockPattern:
    return _ALIVE[int(handle)]


def neighbour_table(heads: list[list[set[int]]]) -> torch.Tensor:
    """Return the tiles that each head's tiles see as `(heads, tiles, slots)` int64, ascending, -1 in unused slots."""
    slots = max(1, *(len(row) for head in heads for row in head))
    rows = [[sorted(row) + [-1] * (slots - len(row)) for row in head] for head in heads]
    return torch.tensor(rows, dtype=torch.int64)


def _digest(words: str, *tables: torch.Tensor) -> str:
    digest = hashlib.sha256(words.encode())
    for table in tables:
        digest.update(struct.pack(f"<{table.numel()}q", *table.flatten().tolist()))
    return digest.hexdigest()[:32]


def _size_of(value: Any) -> int:
    """Bytes of a tensor, of a tuple of them, or of FlexAttention's mask."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_size_of, value if isinstance(value, tuple) else getattr(value, "as_tuple", tuple)()))


__all__ = ["BlockPattern", "constant", "derived", "neighbour_table", "ordinary_tensors"]
