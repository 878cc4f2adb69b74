"""From an opened image of any kind to upright RGB pixels: the one conversion, of training and of the processors."""

import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps

ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 exchange width and height


def orientation_of(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1, upright, where there is none or the metadata are broken."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # metadata may be broken in any way without harm to the pixels
        return 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image in 8-bit RGB, turned as its metadata say.

    16 bits of grey keep their upper 8: Pillow would clip them at 255. Transparency is dropped, as transformers' own
    `load_image` does, not shown on a white ground.

    Raises:
        ValueError: Pixels are floats, whose range is not known.
    """
    if image.mode == "F":
        raise ValueError("`images`: expected pixels of a known range, got a float image; convert it to 8 bits first.")
    image.load()  # before the metadata: these may lie behind the pixels, and reading them decodes
    if orientation_of(image) > 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns of dropping it
        image = image.copy()
        del image.info["transparency"]
    # `load` is enough where the mode is right: converting to the same mode copies
    return image if image.mode == "RGB" else image.convert("RGB")


class UprightRgbMixin:
    """Makes an image processor read images as training does: before its backend, `upright_rgb`."""

    def fetch_images(self, images: Any) -> Any:
        """Return images as they were given, files opened; one or nested lists of them."""
        if isinstance(images, list | tuple):
            return [self.fetch_images(one) for one in images]
        if isinstance(images, str) and os.path.isfile(images):
            with Image.open(images) as image:
                image.load()
                return image
        return super().fetch_images(images)  # type: ignore[misc]

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> Any:
        """Return one image as the backend's array or tensor, channels first."""
        if do_convert_rgb and isinstance(image, Image.Image):
            # as an array, or the backend would look for transparency once more
            image, do_convert_rgb = np.array(upright_rgb(image)), False
            kwargs["input_data_format"] = "channels_last"
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)  # type: ignore[misc]
