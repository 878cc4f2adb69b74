"""One look for all plots and pages: a few colours that colour-blind people tell apart, thin lines, no frames.

The page of `hf-vicreg report` has the same colours in its style sheet. Levels of an attention pattern have those of
`pattern_picture.py`.
"""

import io
from functools import cache
from typing import Any

SERIES = ("#14866a", "#c9560a", "#655db0", "#b8860b", "#b8437f", "#3f7fbf")
RIGHT, WRONG = "#14866a", "#b8460b"
INK, SOFT, LINE = "#1d1d1b", "#62625c", "#e3e2dc"
DOTS_PER_INCH = 110


def new_figure(width: float, height: float) -> Any:
    """Return a figure of its own, in inches: pyplot's global state stays untouched, and no display is needed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure_class()(figsize=(width, height), layout="constrained", dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    return figure


@cache
def _figure_class() -> Any:
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        """A figure that a notebook shows as a picture, although pyplot does not know it."""

        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            self.savefig(content, format="png")
            return content.getvalue()

    return ShownFigure


def tidy(axes: Any, title: str = "") -> None:
    """Give axes of curves the common look."""
    axes.set_prop_cycle(color=SERIES)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=SOFT, labelsize=9)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=11, loc="left", color=INK, fontweight="bold")


def picture_of(axes: Any, image: Any, title: str = "", colour: str = LINE, width: float = 1.0) -> None:
    """Show an image in axes, framed, without ticks; the title is plain text."""
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8, color=INK, parse_math=False)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=width)
