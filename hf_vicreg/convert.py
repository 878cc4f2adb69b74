"""Warm start: weights of a dense ViT, DINOv2 or DINOv3 in a BigBirdViT, and what sparse attention then changes."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, PreTrainedModel

from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
from hf_vicreg.modeling.dense_weights import load_source
from hf_vicreg.modeling.image_processing_bigbird_vit import BigBirdViTImageProcessor
from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTForImageClassification, BigBirdViTModel
from hf_vicreg.training.errors import InputError, blamed_on

MAX_IMAGES = 8
MAX_SIDE = 4096  # pixels; against slips, for the cost of dense attention grows with the fourth power
TOLERANCE = 1e-5
PATTERN_FIELDS = (
    "attention_layout",
    "tile_size",
    "block_size",
    "window_size",
    "num_random_blocks",
    "num_global_tiles",
    "attention_seed",
)
PROCESSOR_FIELDS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
)


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


@dataclass(frozen=True)
class Conversion:
    """What `convert` found.

    Attributes:
        source: Where the weights came from.
        images: What the comparison was made on.
        difference: Largest relative difference, by norm, of hidden states and output between source and dense result.
        drift: One entry for each image size.
        has_processor: Whether the source had an image processor to take along.
    """

    source: str
    images: str
    difference: float
    drift: list[Drift]
    has_processor: bool


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    attention_type: str = "original_full",
    image_sizes: list[int] | None = None,
    images: str | os.PathLike | None = None,
    **pattern: Any,
) -> Conversion:
    """Write a BigBirdViT with the source's weights and its image processor into a new folder.

    Nothing is written unless the result, attending densely, equals the source on every image size.

    Args:
        source: Folder or Hub id of a ViT, DINOv2 (with or without registers) or DINOv3 ViT in safetensors form. A
            ViT's classifier comes along; other heads are left out.
        out: The folder to write, new or empty: model, processor if the source has one, `conversion.json`.
        attention_type: What the written configuration says. Switching it later changes no weight.
        image_sizes: Sides in pixels of the square images to compare on. Default: the source's own, 1.5 and 2 times
            it; its own alone if images or patches are not square, for which transformers resamples no positions.
        images: A folder with images, of which the first 8 are used. Default: 4 images of noise with the spectrum of
            photographs; on yours the drift will be another.
        pattern: Fields of the sparse pattern: `tile_size`, `window_size`, `num_random_blocks`, ...

    Raises:
        InputError: No source, one of another kind, with missing tensors or that cannot take images of these sizes, an
            image or a processor that cannot be read, bad fields, a folder that is not empty, or a result that differs
            from the source.
        OSError: No room to write.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"`OUT`: expected a new or empty folder, got {str(out)!r}.")
    if any(parent.exists() and not parent.is_dir() for parent in out.parents):
        raise InputError(f"`OUT`: expected a folder in a folder, got {str(out)!r}.")
    if attention_type not in ("original_full", "block_sparse"):
        raise InputError(f"`attention_type`: expected 'original_full' or 'block_sparse', got {attention_type!r}.")
    with blamed_on("SOURCE", f"expected a model's folder or Hub id, got {str(source)!r}"):
        config = AutoConfig.from_pretrained(source)
    with_head = config.architectures == ["ViTForImageClassification"]
    with blamed_on("SOURCE"):
        original = load_source(source, AutoModelForImageClassification if with_head else AutoModel)
        dense = (BigBirdViTForImageClassification if with_head else BigBirdViTModel).from_dense(original, **pattern)
    dtype = dense.dtype
    dense.float()
    sizes = _sizes(dense.config, image_sizes)
    processor = _processor(source)
    pictures, described = pictures_of(images, dense.config.num_channels)
    pixels = [pixels_of(pictures, processor, dense.config.num_channels, *size) for size in sizes]
    difference = max(_difference(original.float(), dense, one) for one in pixels)
    if not difference <= TOLERANCE:
        raise InputError(
            f"`SOURCE`: expected outputs equal to the source's to {TOLERANCE} by norm, got {difference:.1e}; "
            "nothing was written."
        )
    del original
    encoder = dense.bigbird_vit if with_head else dense
    drift = [feature_drift(encoder, one) for one in pixels]
    found = Conversion(str(source), described, difference, drift, processor is not None)
    dense.config.attention_type = attention_type  # type: ignore[assignment]
    dense.to(dtype).save_pretrained(out)
    if processor is not None:
        processor.save_pretrained(out)
    (out / "conversion.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    return found


@torch.no_grad()
def feature_drift(model: BigBirdViTModel, pixel_values: torch.Tensor) -> Drift:
    """Return how far features move between dense attention and the sparse pattern in the model's configuration.

    Args:
        model: An encoder, in evaluation mode; its `attention_type` does not matter and is left as it is.
        pixel_values: `(batch, channels, height, width)`, normalised.
    """
    first = 1 + model.config.num_register_tokens
    given, states, patterns = model.config.attention_type, {}, []
    try:
        for attention_type in ("original_full", "block_sparse"):
            model.config.attention_type = attention_type
            outputs = model(pixel_values, output_hidden_states=True)
            states[attention_type] = [
                one[:, first:] for one in (*outputs.hidden_states[1:], outputs.last_hidden_state)
            ]
            patterns = model.attention_patterns(*pixel_values.shape[-2:])
    finally:
        model.config.attention_type = given
    pairs = list(zip(states["original_full"], states["block_sparse"], strict=True))
    height, width = pixel_values.shape[-2:]
    return Drift(
        height=height,
        width=width,
        density=sum(one.density for one in patterns) / len(patterns),
        cosine=[F.cosine_similarity(one.double(), other.double(), dim=-1).mean().item() for one, other in pairs],
        relative_norm=[((one - other).norm() / one.norm()).item() for one, other in pairs],
    )


def report(found: Conversion, config: BigBirdViTConfig) -> str:
    """Return a conversion as lines of text: is it equal, and what does sparse attention change."""
    sizes = [f"{one.height}x{one.width}" for one in found.drift]
    tiles = "x".join(map(str, config.tile_size_hw))
    blocks = f"blocks of {config.block_size}" if config.attention_layout == "raster" else f"tiles of {tiles}"
    lines = [
        f"dense outputs equal the source's at {', '.join(sizes)} pixels, to {found.difference:.1e} by norm",
        f"drift of patch features with sparse attention ({blocks} patches, window {config.window_size}, "
        f"{config.num_random_blocks} random)",
        f"on {found.images}: cosine to the dense features, norm of the difference over theirs",
        "",
        f"{'pixels':>8}" + "".join(f"{size:>16}" for size in sizes),
        f"{'density':>8}" + "".join(f"{one.density:>16.3f}" for one in found.drift),
    ]
    layers = len(found.drift[0].cosine) - 1
    for index in range(layers + 1):
        name = f"layer {index + 1}" if index < layers else "output"
        cells = (f"{one.cosine[index]:>8.4f}{one.relative_norm[index]:>8.4f}" for one in found.drift)
        lines.append(f"{name:>8}" + "".join(cells))
    if all(one.density == 1 for one in found.drift):
        lines += ["", "at these sizes every tile sees every other: choose smaller tiles or larger images"]
    if not found.has_processor:
        lines += ["", "the source has no image processor: normalise pixels as it was trained"]
    return "\n".join(lines)


def _sizes(config: BigBirdViTConfig, sides: list[int] | None) -> list[tuple[int, int]]:
    """The image sizes to compare on."""
    height, width = config.image_size_hw
    if sides is None:
        # transformers resamples the positions of square images and patches alone
        square = height == width and isinstance(config.patch_size, int)
        return [(side, side) for side in (height, height * 3 // 2, height * 2)] if square else [(height, width)]
    for side in sides:
        if not max(config.patch_size_hw) <= side <= MAX_SIDE:
            raise InputError(
                f"`image_sizes`: expected at least one patch {config.patch_size_hw} and at most {MAX_SIDE} pixels, "
                f"got {side}."
            )
    return [(side, side) for side in sides]


def _difference(source: PreTrainedModel, dense: PreTrainedModel, pixel_values: torch.Tensor) -> float:
    """The largest relative difference of the outputs and the hidden states, by norm.

    Raises:
        InputError: The source cannot take images of this size.
    """
    height, width = pixel_values.shape[-2:]
    flags = {}
    if source.config.model_type == "vit" and (height, width) != dense.config.image_size_hw:
        flags["interpolate_pos_encoding"] = True
    with torch.no_grad():
        try:
            expected = source(pixel_values, output_hidden_states=True, **flags)
        except (RuntimeError, TypeError) as error:  # positions that are not square, or no memory
            raise InputError(
                f"`SOURCE`: expected it to take images of {height}x{width} pixels, got: {error}"
            ) from error
        found = dense(pixel_values, output_hidden_states=True)
    pairs = [(found[0], expected[0]), *zip(found.hidden_states, expected.hidden_states, strict=True)]
    if getattr(dense, "pooler", None) is not None:
        pairs.append((found.pooler_output, expected.pooler_output))
    return max(((one - other).norm() / other.norm()).item() for one, other in pairs)


def _processor(source: str | os.PathLike) -> BigBirdViTImageProcessor | None:
    """Our processor with the settings of the source's; None if it has none.

    Raises:
        InputError: One that cannot be read.
    """
    try:
        with blamed_on("SOURCE", "expected a preprocessor_config.json that can be read"):
            theirs = AutoImageProcessor.from_pretrained(source)
    except InputError:
        if (Path(source) / "preprocessor_config.json").exists():
            raise
        return None
    settings = {name: getattr(theirs, name, None) for name in PROCESSOR_FIELDS}
    return BigBirdViTImageProcessor(**{name: value for name, value in settings.items() if value is not None})


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
