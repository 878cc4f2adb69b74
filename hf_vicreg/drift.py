"""How far sparse attention moves the features of patches, and the pixels that this is measured on."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from hf_vicreg.modeling.image_processing_bigbird_vit import BigBirdViTImageProcessor
from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTModel
from hf_vicreg.training.errors import InputError, blamed_on

MAX_IMAGES = 8


@dataclass(frozen=True)
class Drift:
    """How far the features of patches move when attention becomes sparse, at one image size.

    Attributes:
        height: Image height in pixels.
        width: Image width in pixels.
        density: Share of token pairs that the sparse pattern keeps, mean over the layers.
        cosine: For each layer and the normalised output: cosine of dense and sparse features, mean over the patches.
        relative_norm: For each layer and the normalised output: norm of the difference over the norm of the dense.
    """

    height: int
    width: int
    density: float
    cosine: list[float]
    relative_norm: list[float]


@torch.no_grad()
def feature_drift(model: BigBirdViTModel, pixel_values: torch.Tensor, sparse: BigBirdViTModel | None = None) -> Drift:
    """Return how far features move between dense attention and a sparse pattern.

    Args:
        model: An encoder, in evaluation mode; its `attention_type` does not matter and is left as it is.
        pixel_values: `(batch, channels, height, width)`, normalised.
        sparse: Whose features under its sparse pattern are compared; default: the same encoder's.
    """
    first = 1 + model.config.num_register_tokens
    states, patterns = [], []
    for encoder, attention_type in ((model, "original_full"), (sparse or model, "block_sparse")):
        given = encoder.config.attention_type
        try:
            encoder.config.attention_type = attention_type  # type: ignore[assignment]
            outputs = encoder(pixel_values, output_hidden_states=True)
            patterns = encoder.attention_patterns(*pixel_values.shape[-2:])
        finally:
            encoder.config.attention_type = given
        states.append([one[:, first:] for one in (*outputs.hidden_states[1:], outputs.last_hidden_state)])
    pairs = list(zip(*states, strict=True))
    height, width = pixel_values.shape[-2:]
    return Drift(
        height=height,
        width=width,
        density=sum(one.density for one in patterns) / len(patterns),
        cosine=[F.cosine_similarity(one.double(), other.double(), dim=-1).mean().item() for one, other in pairs],
        relative_norm=[((one - other).norm() / one.norm()).item() for one, other in pairs],
    )


def pictures_of(folder: str | os.PathLike | None, channels: int) -> tuple[list[Image.Image] | None, str]:
    """Images to compare on, and what to call them; None stands for noise."""
    if folder is None:
        return None, "4 images of noise"
    if channels != 3:
        raise InputError(f"`images`: expected a source of 3 channels, got {channels}.")
    extensions = Image.registered_extensions()
    paths = sorted(one for one in Path(folder).rglob("*") if one.suffix.lower() in extensions)[:MAX_IMAGES]
    if not paths:
        raise InputError(f"`images`: expected a folder with images, got none in {str(folder)!r}.")
    with blamed_on("images", "expected images that can be read"):
        return [Image.open(one).convert("RGB") for one in paths], f"{len(paths)} images"


def pixels_of(
    pictures: list[Image.Image] | None,
    processor: BigBirdViTImageProcessor | None,
    channels: int,
    height: int,
    width: int,
) -> torch.Tensor:
    """`(batch, channels, height, width)` normalised pixels."""
    if pictures is not None:
        sized = {"size": {"height": height, "width": width}, "do_resize": True, "do_center_crop": False}
        return (processor or BigBirdViTImageProcessor())(pictures, return_tensors="pt", **sized).pixel_values
    # amplitudes fall with the frequency, as in photographs
    noise = torch.fft.rfft2(torch.randn(4, channels, height, width, generator=torch.Generator().manual_seed(0)))
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequencies = (rows.square() + columns.square()).sqrt().clamp(min=1 / max(height, width))
    images = torch.fft.irfft2(noise / frequencies, s=(height, width))
    return (images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), keepdim=True)
