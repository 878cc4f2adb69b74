"""Warm start: weights of a dense ViT, DINOv2 or DINOv3 in a BigBirdViT, and what sparse attention then changes."""

import copy
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, PreTrainedModel

from hf_vicreg.drift import Drift, feature_drift, pictures_of, pixels_of
from hf_vicreg.model_cards.shipped import located
from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
from hf_vicreg.modeling.dense_weights import load_source
from hf_vicreg.modeling.image_processing_bigbird_vit import BigBirdViTImageProcessor
from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTForImageClassification, BigBirdViTModel
from hf_vicreg.training.errors import InputError, blamed_on
from hf_vicreg.training.evaluation.encoder import load_config, quiet_transformers
from hf_vicreg.training.images.sources import ImageSource, load_sources
from hf_vicreg.training.run.arguments import seconds_of
from hf_vicreg.training.run.places import data_setting, lacks_processor

if TYPE_CHECKING:
    from hf_vicreg.training.prepare.adapt import Adaptation

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
class Conversion:
    """What `convert` found.

    Attributes:
        source: Where the weights came from.
        images: What the comparison was made on.
        difference: Largest relative difference, by norm, of hidden states and output between source and dense result.
        drift: One entry for each image size.
        has_processor: Whether the source had an image processor to take along.
        adaptation: What tuning to the dense features did, where that was asked for.
        adapted_drift: Drift after it.
    """

    source: str
    images: str
    difference: float
    drift: list[Drift]
    has_processor: bool
    adaptation: "Adaptation | None" = None
    adapted_drift: list[Drift] | None = None


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    attention_type: str = "original_full",
    image_sizes: list[int] | None = None,
    images: str | os.PathLike | None = None,
    adapt: str | os.PathLike | None = None,
    time_budget: str = "10m",
    max_steps: int | None = None,
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
        adapt: Images to tune the sparse result on until its features are the dense source's again; see
            `hf_vicreg.training.prepare.adapt`. A folder, a `datasets` folder, a Hub id or `"digits"`. What is written
            is sparse then.
        time_budget: For that, `90s`, `10m`, `2h`.
        max_steps: Of that, instead of what the time holds.
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
    config = load_config(os.fspath(source), "SOURCE")
    source = located(os.fspath(source))
    with_head = config.architectures == ["ViTForImageClassification"]
    with blamed_on("SOURCE"):
        original = load_source(source, AutoModelForImageClassification if with_head else AutoModel)
        dense = (BigBirdViTForImageClassification if with_head else BigBirdViTModel).from_dense(original, **pattern)
    if adapt is not None and dense.config.num_channels != 3:
        raise InputError(
            f"`adapt`: expected a model of RGB images, {str(source)!r} takes {dense.config.num_channels} channels; "
            "leave it out."
        )
    seconds = seconds_of(time_budget)
    if max_steps is not None and adapt is None:
        raise InputError("`max_steps`: expected images to tune on beside it, got none; add --adapt IMAGES.")
    if max_steps is not None and max_steps < 1:
        raise InputError(f"`max_steps`: expected at least 1, got {max_steps}.")
    unlabelled = None if adapt is None else load_sources(**data_setting(os.fspath(adapt), {}))[0]
    dtype = dense.dtype
    dense.float()
    if adapt is not None and image_sizes is None:
        image_sizes = _own_and_twice(dense.config)
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
    if unlabelled is not None:
        adaptation, moved = _adapted(encoder, unlabelled, processor, pixels, sizes, seconds, max_steps)
        found = replace(found, adaptation=adaptation, adapted_drift=moved)
        attention_type = "block_sparse"
    dense.config.attention_type = attention_type  # type: ignore[assignment]
    with quiet_transformers():
        dense.to(dtype).save_pretrained(out)
    if processor is not None:
        processor.save_pretrained(out)
    (out / "conversion.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    return found


def _adapted(
    encoder: BigBirdViTModel,
    images: ImageSource,
    processor: BigBirdViTImageProcessor | None,
    pixels: list[torch.Tensor],
    sizes: list[tuple[int, int]],
    seconds: float,
    max_steps: int | None,
) -> "tuple[Adaptation, list[Drift]]":
    """Tune an encoder's sparse form to its dense one, in place; what that did, and the drift that is left."""
    from hf_vicreg.training.prepare.adapt import adapt

    dense = copy.deepcopy(encoder)
    dense.config.attention_type, encoder.config.attention_type = "original_full", "block_sparse"
    processor = processor or BigBirdViTImageProcessor()
    done = adapt(dense, encoder, images, processor, sizes, seconds, max_steps=max_steps)
    return done, [feature_drift(dense, one, encoder.eval()) for one in pixels]


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
    lines += _by_layer(found.drift)
    if all(one.density == 1 for one in found.drift):
        lines += ["", "at these sizes every tile sees every other: choose smaller tiles or larger images"]
    if found.adaptation is not None:
        lines += [
            "",
            *_adaptation_lines(found.adaptation),
            "",
            "drift that is left",
            *_by_layer(found.adapted_drift or []),
        ]
    if not found.has_processor:
        lines += ["", "the source has no image processor: normalise pixels as it was trained"]
    return "\n".join(lines)


def _by_layer(drift: list[Drift]) -> list[str]:
    lines, layers = [], len(drift[0].cosine) - 1
    for index in range(layers + 1):
        name = f"layer {index + 1}" if index < layers else "output"
        cells = (f"{one.cosine[index]:>8.4f}{one.relative_norm[index]:>8.4f}" for one in drift)
        lines.append(f"{name:>8}" + "".join(cells))
    return lines


def _adaptation_lines(done: "Adaptation") -> list[str]:
    lines = [
        f"tuned to the dense features on {done.num_images} images, {done.steps} steps, {done.seconds:.0f} s; measured "
        f"on {done.num_held_out} others:",
        f"{'pixels':>10} {'cosine of pooled features':>28} {'ten nearest in common':>24}",
    ]
    for before, after in zip(done.before, done.after, strict=True):
        size, cosine = f"{before.height}x{before.width}", f"{before.cosine:.4f} -> {after.cosine:.4f}"
        lines.append(f"{size:>10} {cosine:>28} {f'{before.neighbours:.2f} -> {after.neighbours:.2f}':>24}")
    return lines


def _own_and_twice(config: BigBirdViTConfig) -> list[int] | None:
    """Sides in pixels of the source's own images and of twice that; None where it is not square."""
    height, width = config.image_size_hw
    return [height, 2 * height] if height == width and isinstance(config.patch_size, int) else None


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
        InputError: One that cannot be read, or the Hub does not say whether there is one.
    """
    try:
        with blamed_on("SOURCE", "expected a preprocessor_config.json that can be read"):
            theirs = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except InputError:
        if not lacks_processor(os.fspath(source), "SOURCE"):
            raise
        return None
    settings = {name: getattr(theirs, name, None) for name in PROCESSOR_FIELDS}
    return BigBirdViTImageProcessor(**{name: value for name, value in settings.items() if value is not None})
