"""Images inside a page: small copies of their pixels as `data:` addresses."""

import base64
import io

import torch
from PIL import Image

LARGEST_SIDE = 320  # in pixels, of an image that is shown


def data_uri(image: Image.Image, side: int = LARGEST_SIDE) -> str:
    """Return an image as a `data:` address: PNG where it is small, else JPEG, no larger than `side`."""
    image = fitted(image, side)
    with io.BytesIO() as file:
        small = image.width * image.height <= 64 * 64
        # pixels from a new image: comments and profiles of the old one stay behind
        plain = Image.frombytes("RGB", image.size, image.tobytes())
        plain.save(file, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 85}))
        kind = "png" if small else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def fitted(image: Image.Image, side: int) -> Image.Image:
    """Return an RGB image whose longer side is at most `side` pixels."""
    image = image.convert("RGB")
    scale = side / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(scale * one)) for one in image.size], Image.Resampling.LANCZOS)


def image_of(pixel_values: torch.Tensor, mean: list[float], std: list[float]) -> Image.Image:
    """Return what a model was given as an image.

    Args:
        pixel_values: `(3, height, width)`, normalised.
        mean: Of each channel, of pixels in [0, 1].
        std: The same.
    """
    deviation, centre = (torch.tensor(values).view(-1, 1, 1) for values in (std, mean))
    pixels = (pixel_values.cpu().float() * deviation + centre).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
