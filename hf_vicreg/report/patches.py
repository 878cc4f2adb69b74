"""What patches mean to an encoder: the first three principal components of their tokens as red, green and blue."""

from typing import Any, NamedTuple

import torch
from PIL import Image

from hf_vicreg.report.pictures import image_of, normalisation_of
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import VisionEncoder

MAX_PATCHES = 4096
CUT = 0.02  # share of the tokens whose colour is cut off at either end


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


class PatchColours:
    """Colours of patches in one space for all sizes: principal components of the tokens that it is made from."""

    def __init__(self, tokens: torch.Tensor):
        """Find the components of tokens `(..., hidden_size)`."""
        flat = tokens.flatten(0, -2).double()
        self.mean = flat.mean(0)
        components = torch.linalg.svd(flat - self.mean, full_matrices=False).Vh[:3]
        # a component's sign is arbitrary; here its largest entry is positive, whatever the library
        largest = components.abs().argmax(1, keepdim=True)
        self.components = components * components.gather(1, largest).sign()
        projected = (flat - self.mean) @ self.components.T
        self.low, self.high = (projected.quantile(at, dim=0) for at in (CUT, 1 - CUT))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return colours `(..., 3)` in [0, 1] of tokens `(..., hidden_size)`; of fewer components than 3, grey."""
        projected = (tokens.double() - self.mean) @ self.components.T
        colours = ((projected - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(0, 1)
        missing = 3 - colours.shape[-1]
        return torch.nn.functional.pad(colours, (0, missing), value=0.5)


def colour_images(colours: torch.Tensor) -> list[Image.Image]:
    """Return an image of a pixel a patch of colours `(batch, rows, columns, 3)`."""
    return [Image.fromarray(one.mul(255).round().to(torch.uint8).numpy()) for one in colours]
