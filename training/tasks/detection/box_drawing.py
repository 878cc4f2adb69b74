"""Boxes and labels on an image."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from hf_vicreg.model_cards.escaping import one_line

# light and saturated, so that black letters can be read on each
COLOURS = (
    "#4fc3f7",
    "#ffb74d",
    "#aed581",
    "#f06292",
    "#fff176",
    "#ba68c8",
    "#4db6ac",
    "#ff8a65",
    "#90a4ae",
    "#dce775",
)


def draw_found(
    image: Image.Image, found: dict[str, torch.Tensor], class_names: Mapping[int, str] | Sequence[str]
) -> Image.Image:
    """Return a copy of an image with the boxes that `find_boxes` found on it, each with its class and score."""
    labels = found["labels"].tolist()
    texts = [
        f"{one_line(class_names[label])} {score:.2f}"
        for label, score in zip(labels, found["scores"].tolist(), strict=True)
    ]
    return draw_boxes(image, found["boxes"].tolist(), labels, texts)


def draw_boxes(
    image: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[int], texts: Sequence[str]
) -> Image.Image:
    """Return a copy of an image with a box and a text for each object, one colour a class.

    Args:
        image: RGB.
        boxes: Left, top, right, bottom in pixels, cut at the border.
        labels: Class index of each box.
        texts: What to write at each box.
    """
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    unit = max(image.size) / 640  # lines and letters of the same share of any image
    width, font = max(1, round(2 * unit)), ImageFont.load_default(max(9, round(11 * unit)))
    for box, label, text in zip(boxes, labels, texts, strict=True):
        left, top, right, bottom = (
            min(max(side, 0), limit - 1) for side, limit in zip(box, image.size * 2, strict=True)
        )
        if right <= left or bottom <= top:
            continue
        colour = COLOURS[label % len(COLOURS)]
        draw.rectangle((left, top, right, bottom), outline=colour, width=width)
        x0, y0, x1, y1 = draw.textbbox((0, 0), text, font=font)
        text_width, text_height = x1 - x0 + 2 * width, y1 - y0 + 2 * width
        # above the box, or inside of it where there is no room
        x = max(0, min(left, image.width - text_width))
        y = top - text_height if top >= text_height else top
        draw.rectangle((x, y, x + text_width, y + text_height), fill=colour)
        draw.text((x + width - x0, y + width - y0), text, fill="black", font=font)
    return drawn
