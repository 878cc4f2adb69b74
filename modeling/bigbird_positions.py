"""Where a patch is: rotary tables on normalised coordinates, or a learned table resampled to the grid.

With padding, positions are those of each image's valid area. A patch that holds any valid pixel is valid, so an image
has the same positions alone and in a padded batch if its sides are whole patches that do not overlap.
"""

import math

import torch
import torch.nn.functional as F


def rotary_tables(
    head_dim: int, theta: float, valid: torch.Tensor | None, rows: int, columns: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of the rotary positions.

    Coordinates are patch centres scaled to (-1, 1) over the image, or over each image's valid area when some patches
    are padding. The first half of the frequencies turns with the row, the second with the column.

    Source: Siméoni et al. 2025, DINOv3 (arXiv 2508.10104), section 3.2: axial RoPE on normalised coordinates. Without
    the training-time jitter of coordinates.

    Args:
        head_dim: Width of an attention head, a multiple of 4.
        theta: Base of the frequencies.
        valid: `(batch, rows, columns)` bool, or None when every patch is valid.
        rows: Rows of patches.
        columns: Columns of patches.
        device: Where to put the tables.

    Returns:
        Two float32 tensors `(batch or 1, 1, patches, head_dim)`, patches in raster order.
    """
    num_frequencies = head_dim // 4
    exponents = torch.arange(num_frequencies, dtype=torch.float32, device=device) / num_frequencies
    frequencies = 2 * math.pi * theta**-exponents
    valid_rows, valid_columns = (None, None) if valid is None else (valid.any(2), valid.any(1))
    row_angles, column_angles = (
        (2 * _fractions(lines, count, frequencies) - 1)[..., None] * frequencies
        for lines, count in ((valid_rows, rows), (valid_columns, columns))
    )
    angles = torch.cat(
        [
            row_angles[:, :, None].expand(-1, -1, columns, -1),
            column_angles[:, None].expand(-1, rows, -1, -1),
        ],
        dim=-1,
    ).flatten(1, 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def with_global_tokens(
    tables: tuple[torch.Tensor, torch.Tensor], num_global: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rotary tables with `num_global` tokens in front that no rotation moves: cosine 1, sine 0."""
    cos, sin = tables
    return F.pad(cos, (0, 0, num_global, 0), value=1.0), F.pad(sin, (0, 0, num_global, 0))


def rotate(tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return `(batch, heads, tokens, head_dim)` rotated by tables `(batch or 1, 1, tokens, head_dim)`.

    Under autocast the tables are fp32 and the tokens are not: the result has the tokens' type.
    """
    first, second = tokens.chunk(2, dim=-1)
    return (tokens * cos + torch.cat([-second, first], dim=-1) * sin).to(tokens.dtype)


def resampled_positions(
    table: torch.Tensor, valid: torch.Tensor | None, rows: int, columns: int, antialias: bool
) -> torch.Tensor:
    """Return a learned table of positions, resampled by a bicubic kernel to another grid.

    In a padded batch a product with a matrix for rows and one for columns takes the place of
    `torch.nn.functional.interpolate`, so that every image can have its own.

    Args:
        table: `(native rows, native columns, hidden_size)`.
        valid: `(batch, rows, columns)` bool, or None when every patch is valid. Each image's table is stretched over
            its valid area; what padding gets is finite and means nothing.
        rows: Rows of patches.
        columns: Columns of patches.
        antialias: Widen the kernel where the grid is coarser than the table, as DINOv2 with registers does.

    Returns:
        `(batch or 1, rows * columns, hidden_size)` in raster order, in the table's type; summed in at least fp32.
    """
    if valid is None and table.shape[:2] == (rows, columns):
        return table.flatten(0, 1)[None]
    precise = table.to(torch.promote_types(table.dtype, torch.float32))
    if valid is None:
        image = precise.permute(2, 0, 1)[None]
        resampled = F.interpolate(image, size=(rows, columns), mode="bicubic", antialias=antialias)
        return resampled.flatten(2).transpose(1, 2).to(table.dtype)
    by_row, by_column = (
        _bicubic(_fractions(lines, count, precise), _extent(lines), native, antialias)
        for lines, count, native in zip((valid.any(2), valid.any(1)), (rows, columns), table.shape[:2], strict=True)
    )
    with torch.autocast(table.device.type, enabled=False):
        return torch.einsum("brn,nmd,bcm->brcd", by_row, precise, by_column).flatten(1, 2).to(table.dtype)


def _bicubic(fractions: torch.Tensor, extent: torch.Tensor, native: int, antialias: bool) -> torch.Tensor:
    """`(batch, lines, native)` weights of a table's entries at `fractions` of its length.

    Keys' cubic kernel with a = -0.75, the table continued by its border values; with `antialias` a = -0.5 and a kernel
    `native / extent` times as wide, cut at the border and normalised.

    Source: Keys 1981, IEEE Transactions on Acoustics, Speech, and Signal Processing 29(6); the two
    choices of a are torch's.
    """
    a = -0.5 if antialias else -0.75
    margin = 0 if antialias else 2  # entries beyond the border, where its values go on
    entries = torch.arange(-margin, native + margin, device=fractions.device).to(fractions.dtype) + 0.5
    x = (entries - fractions[..., None] * native).abs()
    if antialias:
        x = x / (native / extent.to(x.dtype)).clamp(min=1)[..., None]
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    weights = near.where(x < 1, far.where(x < 2, 0.0))
    if antialias:
        total = weights.sum(-1, keepdim=True)
        return weights / total.where(total > 1e-3, 1.0)  # lines of padding may be out of reach
    inner = weights[..., 2:-2].clone()
    inner[..., 0] += weights[..., :2].sum(-1)
    inner[..., -1] += weights[..., -2:].sum(-1)
    return inner


def _fractions(lines: torch.Tensor | None, count: int, like: torch.Tensor) -> torch.Tensor:
    """`(batch or 1, count)` centres of rows or columns, from 0 to 1 over those that hold a valid patch."""
    index = torch.arange(count, device=like.device)[None]
    if lines is None:
        return (index + 0.5).to(like.dtype) / count
    return (index - _first(lines) + 0.5).to(like.dtype) / _extent(lines)


def _first(lines: torch.Tensor) -> torch.Tensor:
    """`(batch, 1)` the first valid line; their number if there is none."""
    count = lines.shape[1]
    return torch.arange(count, device=lines.device)[None].where(lines, count).amin(1, keepdim=True)


def _extent(lines: torch.Tensor) -> torch.Tensor:
    """`(batch, 1)` lines from the first valid one to the last; an image of padding alone has extent 1."""
    end = torch.arange(1, lines.shape[1] + 1, device=lines.device)[None].where(lines, 0).amax(1, keepdim=True)
    return (end - _first(lines)).clamp(min=1)
