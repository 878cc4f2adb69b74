"""The built-in data set: scikit-learn's scanned digits on a larger field. No download.

Each of the 1,797 digits (8x8 pixels, Alpaydin and Kaynak 1998) is drawn once, at a random place, angle and size on a
black field of 32x32, so that pixels alone do not already tell the class. The drawing depends on a fixed seed, not on
the run's.
"""

import random

import numpy as np
from PIL import Image

from hf_vicreg.training.errors import InputError

FIELD_SIZE = 32
DIGIT_SIZES = (16, 26)  # side of the digit in pixels, drawn uniformly
ANGLE_DEGREES = 15
NUM_TEST = 360
DRAWING_SEED = 20220128


def digit_images() -> tuple[dict[str, list[Image.Image]], dict[str, list[int]]]:
    """Return images and labels, each by split: `train` (1,437) and `test` (360), split at random with a fixed seed.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "`dataset_name`: 'digits' needs scikit-learn, which is not installed; pip install scikit-learn."
        ) from error
    digits = load_digits()
    rng = random.Random(DRAWING_SEED)
    drawn = [_draw(pixels, rng) for pixels in digits.images]
    order = list(range(len(drawn)))
    rng.shuffle(order)
    splits = {"train": order[NUM_TEST:], "test": order[:NUM_TEST]}
    images = {name: [drawn[index] for index in indices] for name, indices in splits.items()}
    labels = {name: [int(digits.target[index]) for index in indices] for name, indices in splits.items()}
    return images, labels


def _draw(pixels: np.ndarray, rng: random.Random) -> Image.Image:
    digit = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
    size = rng.randint(*DIGIT_SIZES)
    digit = digit.resize((size, size), Image.Resampling.BICUBIC)
    digit = digit.rotate(rng.uniform(-ANGLE_DEGREES, ANGLE_DEGREES), Image.Resampling.BICUBIC, expand=True)
    field = Image.new("L", (FIELD_SIZE, FIELD_SIZE))
    left, top = (rng.randint(min(0, FIELD_SIZE - side), max(0, FIELD_SIZE - side)) for side in digit.size)
    field.paste(digit, (left, top))
    return field.convert("RGB")
