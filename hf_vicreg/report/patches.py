"""Images as an encoder is given them, and the tokens of their patches."""

from typing import Any, NamedTuple

import torch
from PIL import Image

from hf_vicreg.hub_space.pictures import image_of
from hf_vicreg.report.pictures import normalisation_of
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import VisionEncoder

MAX_PATCHES = 4096


class Given(NamedTuple):
    """Images as a model was given them.

    Attributes:
        pixels: `(batch, 3, height, width)`.
        shown: The same as images.
    """

    pixels: torch.Tensor
    shown: list[Image.Image]


def given_at(encoder: VisionEncoder, images: list[Image.Image], scale: int) -> Given:
    """Return images as the encoder's processor prepares them, at its own size times `scale`."""
    pixels = encoder.processor(images, return_tensors="pt")["pixel_values"]
    if scale > 1:
        height, width = (scale * side for side in pixels.shape[-2:])
        size = {"height": height, "width": width}
        crop = {"crop_size": size} if getattr(encoder.processor, "do_center_crop", False) else {}
        pixels = encoder.processor(images, size=size, **crop, return_tensors="pt")["pixel_values"]
    norm = normalisation_of(encoder.processor)
    return Given(pixels, [image_of(one, *map(list, norm)) for one in pixels])


def patch_tokens(encoder: VisionEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """Return the patches' tokens `(batch, rows, columns, hidden_size)` float32 on the CPU, image after image.

    Raises:
        InputError: The model has none, or none at this size.
    """
    height, width = pixels.shape[-2:]
    config = encoder.model.config
    native = getattr(config, "image_size", None)
    resampled: dict[str, Any] = {}
    if native not in (None, height, (height, width)) and config.model_type != "bigbird_vit":
        resampled = {"interpolate_pos_encoding": True}
    found = []
    for one in pixels.to(encoder.model.device).split(1):
        try:
            with torch.no_grad():
                outputs = encoder.model(pixel_values=one, **resampled)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"`MODEL`: takes no images of {height}x{width} pixels.") from error
        found.append(encoder.patch_tokens(outputs, height, width).float().cpu())
    return torch.cat(found)
