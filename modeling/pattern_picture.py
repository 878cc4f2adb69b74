"""Pictures of a block pattern: a few lines of text for a terminal, an SVG for a notebook or a page."""

from collections.abc import Iterator

MARKS = {"query": "Q", "global": "G", "local": "#", "random": "r", "": "."}
COLOURS = {"query": "#222222", "global": "#d95f02", "local": "#1b9e77", "random": "#7570b3", "": "#eeeeee"}
LEGEND = (
    ("query", "the tile that looks"),
    ("global", "global: sees and is seen by all"),
    ("local", "local: its window"),
    ("random", "random"),
)


def text_picture(levels: list[str], columns: int) -> str:
    """Return what one tile sees, a character for each tile of the image: Q itself, G global, # local, r random.

    Args:
        levels: For each tile in raster order `"query"`, `"global"`, `"local"`, `"random"`, or `""` if it is not seen.
        columns: Tiles in a row of the image.
    """
    marks = [MARKS[level] for level in levels]
    return "\n".join(" ".join(marks[start : start + columns]) for start in range(0, len(marks), columns))


def svg_picture(levels: list[str], columns: int, table: list[list[str]], title: str) -> str:
    """Return an SVG: on the left what one tile sees on the image, on the right which tile sees which.

    Args:
        levels: As in `text_picture`.
        columns: Tiles in a row of the image.
        table: `levels` for every tile: row after row of the right picture.
        title: A line above both.
    """
    side = 320
    image_rows = -(-len(levels) // columns)
    image_cell = side / max(columns, image_rows)
    image = [levels[start : start + columns] for start in range(0, len(levels), columns)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * side + 60} {side + 100}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="20" y="22">{title}</text>',
        *_cells(image, 20, 54, image_cell),
        *_cells(table, side + 40, 54, side / len(table)),
        '<text x="20" y="46" fill="#555555">tiles of the image</text>',
        f'<text x="{side + 40}" y="46" fill="#555555">which tile (row) sees which (column)</text>',
    ]
    at = 20
    for level, words in LEGEND:
        parts.append(f'<rect x="{at}" y="{side + 72}" width="12" height="12" fill="{COLOURS[level]}"/>')
        parts.append(f'<text x="{at + 17}" y="{side + 83}">{words}</text>')
        at += 34 + 7 * len(words)
    return "\n".join([*parts, "</svg>"])


def _cells(rows: list[list[str]], left: float, top: float, cell: float) -> Iterator[str]:
    """Yield a rectangle for each run of equal cells in a row."""
    gap = min(1.0, cell / 6)
    for y, row in enumerate(rows):
        start = 0
        for x, level in enumerate(row):
            # wide cells are drawn one by one, so that a person can count them
            if x + 1 < len(row) and row[x + 1] == level and cell < 8:
                continue
            yield (
                f'<rect x="{left + start * cell:.2f}" y="{top + y * cell:.2f}" '
                f'width="{(x + 1 - start) * cell - gap:.2f}" height="{cell - gap:.2f}" fill="{COLOURS[level]}"/>'
            )
            start = x + 1


__all__ = ["svg_picture", "text_picture"]
