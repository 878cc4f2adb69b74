"""Drawn pictures with captions, to try training on images and captions with nothing to download.

    python -m benchmarks.captioned_shapes --out shapes

A picture shows one or two shapes of a colour and a size somewhere on a grey ground; its captions say so in English and
in German. Pairs of colour and shape that come in the test split alone show whether words are understood one by one.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": ("rot", (215, 40, 40)),
    "green": ("grün", (40, 160, 60)),
    "blue": ("blau", (40, 80, 210)),
    "yellow": ("gelb", (240, 210, 40)),
    "purple": ("lila", (140, 60, 170)),
    "black": ("schwarz", (25, 25, 25)),
}
SHAPES = {"circle": "Kreis", "square": "Quadrat", "triangle": "Dreieck", "ring": "Ring", "cross": "Kreuz"}
SIZES = {"small": ("klein", 9), "large": ("groß", 17)}
HELD_OUT = {("red", "ring"), ("blue", "triangle"), ("green", "cross"), ("yellow", "circle")}
SIDE = 48


def main() -> None:
    """Write a folder of images with `train` and `test` and their metadata."""
    parser = argparse.ArgumentParser(description="Drawn pictures with captions.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--num_train", type=int, default=4000)
    parser.add_argument("--num_test", type=int, default=400)
    arguments = parser.parse_args()
    for split, count in (("train", arguments.num_train), ("test", arguments.num_test)):
        draws, folder, lines = random.Random(split), arguments.out / split, []
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, captions = picture(draws, held_out=split == "test" and number % 4 == 0)
            image.save(folder / f"{number:05d}.png")
            lines.append(json.dumps({"file_name": f"{number:05d}.png"} | captions, ensure_ascii=False))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def picture(draws: random.Random, *, held_out: bool) -> tuple[Image.Image, dict[str, str]]:
    """Return a picture and its captions, of pairs that were held out or of the others."""
    ground = draws.randint(150, 235)
    image = Image.new("RGB", (SIDE, SIDE), (ground,) * 3)
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES if ((colour, shape) in HELD_OUT) == held_out]
    english, german = [], []
    for side in range(draws.choice((1, 1, 2))):
        (colour, shape), size = draws.choice(pairs), draws.choice(list(SIZES))
        radius = SIZES[size][1] * (0.6 if side else 1.0)
        x, y = (draws.uniform(radius, SIDE - radius) for _ in range(2))
        _draw(ImageDraw.Draw(image), shape, COLOURS[colour][1], x, y, radius)
        english.append(f"a {size} {colour} {shape}")
        german.append(f"{SHAPES[shape]}, {SIZES[size][0]}, {COLOURS[colour][0]}")
    return image, {"text": " and ".join(english), "text_de": " und ".join(german)}


def _draw(
    onto: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: float, y: float, radius: float
) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        onto.ellipse(box, fill=colour)
    elif shape == "square":
        onto.rectangle(box, fill=colour)
    elif shape == "triangle":
        onto.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    elif shape == "ring":
        onto.ellipse(box, outline=colour, width=max(2, round(radius / 3)))
    else:
        third = radius / 3
        onto.rectangle((x - third, y - radius, x + third, y + radius), fill=colour)
        onto.rectangle((x - radius, y - third, x + radius, y + third), fill=colour)


if __name__ == "__main__":
    main()
