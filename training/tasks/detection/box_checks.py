"""Boxes as data sets have them: cut at the border of their image, left out where nothing of them is left, counted."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

from hf_vicreg.training.errors import InputError

logger = logging.getLogger(__name__)

TOLERANCE = 1.0  # pixels that a box may lie outside of its image, from rounding or from counting pixels from 1
NUM_LISTED = 20


@dataclass
class BoxCheck:
    """Checks the boxes of a split, one after the other, and keeps account of those that were not right.

    Attributes:
        split: Its name.
        strict: Whether a box without area or outside of its image is an error.
        seen: Boxes checked.
        tiny: Those at most a pixel large, as all are that are given as shares of the image.
        clipped: Those that were cut by more than a pixel, in words.
        dropped: Those that were left out, in words.
    """

    split: str
    strict: bool = False
    seen: int = 0
    tiny: int = 0
    clipped: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def box(self, box: Any, size: tuple[int, int] | None, row: int) -> list[float] | None:
        """Return a box (x, y, width, height) cut at the border of its image, None if nothing of it is left.

        Args:
            box: As it is given.
            size: (height, width) of the image, None if it is not known.
            row: Of the image, for messages.

        Raises:
            InputError: Not four numbers; if `strict`, also no area, or outside of the image by more than a pixel.
        """
        where = f"row {row} of {self.split!r}"
        self.seen += 1
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(isinstance(one, int | float) for one in box):
            raise InputError(
                f"`objects_column_name`: expected boxes of four numbers (x, y, width, height in pixels), got {box!r} "
                f"in {where}."
            )
        if not all(map(math.isfinite, box)):
            self._drop(box, where, "consist of finite numbers")
            return None
        left, top, width, height = map(float, box)
        right, bottom = left + width, top + height
        if width <= 0 or height <= 0:
            self._drop(box, where, "have a width and a height above 0")
            return None
        if size is None:
            return [left, top, width, height]
        if max(width, height) <= 1 < min(size):
            self.tiny += 1
            if self.strict:
                raise InputError(_shares(box, where))
        inside = f"lie inside the image of {size[1]}x{size[0]} pixels"
        far = min(left, top) < -TOLERANCE or right > size[1] + TOLERANCE or bottom > size[0] + TOLERANCE
        left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, size[1]), min(bottom, size[0])
        if right <= left or bottom <= top:
            self._drop(box, where, inside)
            return None
        if far:
            if self.strict:
                raise InputError(_refused(box, where, inside))
            self.clipped.append(f"{box!r} in {where}, cut to {size[1]}x{size[0]} pixels")
        return [left, top, right - left, bottom - top]

    def finish(self) -> None:
        """Say what was cut and left out.

        Raises:
            InputError: All boxes are at most a pixel large, which means shares of the image.
        """
        if self.seen and self.tiny == self.seen:
            raise InputError(_shares(f"all {self.seen:,} boxes", repr(self.split)))
        for what, found in (("cut at the border of their images", self.clipped), ("left out", self.dropped)):
            if found:
                logger.warning("%r: %d of %d boxes were %s:", self.split, len(found), self.seen, what)
                for one in found[:NUM_LISTED]:
                    logger.warning("  %s", one)
                if len(found) > NUM_LISTED:
                    logger.warning("  and %d more; --strict_boxes stops at the first", len(found) - NUM_LISTED)
        if len(self.clipped) + len(self.dropped) > self.seen / 2:
            logger.warning("%r: most boxes are not right; they have to be (x, y, width, height) in pixels", self.split)

    def _drop(self, box: Any, where: str, expected: str) -> None:
        if self.strict:
            raise InputError(_refused(box, where, expected))
        self.dropped.append(f"{box!r} in {where}, which does not {expected}")


def _refused(box: Any, where: str, expected: str) -> str:
    return (
        f"`objects_column_name`: expected boxes that {expected}, got {box!r} in {where}; boxes are (x, y, width, "
        "height) in pixels, and without --strict_boxes they are cut or left out."
    )


def _shares(what: Any, where: str) -> str:
    return (
        f"`objects_column_name`: expected boxes in pixels, got {what} in {where} at most one pixel large; multiply "
        "shares by the image's width and height."
    )
