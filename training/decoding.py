"""From the bytes of an image file to upright RGB pixels, whatever people have in their folders.

What is dealt with: turned photographs (EXIF), grey, palette, CMYK and 16-bit pixels, animations (their first frame),
doubtful metadata (ignored), images too large for memory (refused before they are decoded), and JPEGs far larger than
what is wanted of them, which are decoded at a half, a quarter or an eighth of their size.
"""

import warnings
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

MAX_PIXELS = 2**27  # decoded, half a gigabyte; a JPEG may have 64 times as many
JPEG_START = b"\xff\xd8\xff"
ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 exchange width and height


def decode(
    encoded: bytes, min_size: tuple[int, int] = (1, 1), reduction: Callable[[int, int], int] | None = None
) -> Image.Image:
    """Return the image in RGB, upright.

    Args:
        encoded: An image file's contents.
        min_size: Smallest image to accept, (height, width) in pixels.
        reduction: Called with the upright (width, height); returns how many times smaller each side may be decoded.
            Followed by JPEGs alone, up to 8 and never beyond what it says.

    Raises:
        Exception: Whatever Pillow raises on broken files, which is nearly anything; ValueError for an image that is
            too small, too large, or of floats without a known range.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken metadata, sizes that are checked below
        if encoded.startswith(JPEG_START):
            # `Image.open` would refuse by size what can be decoded at an eighth of it
            image: Image.Image = JpegImageFile(BytesIO(encoded))
        else:
            image = Image.open(BytesIO(encoded))
        original = image.size
        if isinstance(image, JpegImageFile):
            wanted = reduction(*_upright(original, image)) if reduction is not None else 1
            needed = max(1.0, (image.width * image.height / MAX_PIXELS) ** 0.5)
            factor = next((one for one in (8, 4, 2) if one <= wanted or one / 2 < needed <= one), 1)
            if factor > 1:
                image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"expected at most {MAX_PIXELS:,} pixels, got {original[0]} x {original[1]}")
        image.load()  # before the metadata of other formats: these may lie behind the pixels, and reading them decodes
        width, height = _upright(original, image)
        if height < min_size[0] or width < min_size[1]:
            raise ValueError(f"expected at least {min_size} pixels (height, width), got {(height, width)}")
        return _to_rgb(ImageOps.exif_transpose(image) if _orientation(image) > 1 else image)


def _upright(size: tuple[int, int], image: Image.Image) -> tuple[int, int]:
    return size[::-1] if _orientation(image) >= 5 else size


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # metadata may be broken in any way without harm to the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("expected pixels of a known range, got floats")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    # `load` is enough where the mode is right: converting to the same mode copies
    return image if image.mode == "RGB" else image.convert("RGB")
