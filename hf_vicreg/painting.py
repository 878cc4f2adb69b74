"""Inpainting: the masked part of an image painted by a SimMIM or MAE model, the most certain tiles first.

How certain a model is of a tile is not in its output. So it paints each time several times, further visible tiles
hidden from it each time: where what it paints depends little on what it sees, it is certain. The most certain tiles
become visible with what was painted, and the next pass starts from there. With a temperature above 0 a tile is drawn:
the painting, and the deviation of one of those others times the temperature, as the seed says.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from hf_vicreg.modeling.configuration_bigbird_mae import BigBirdViTMAEConfig
from hf_vicreg.modeling.image_patches import patchify, unpatchify
from hf_vicreg.modeling.masked_objectives import masked_part, painter_of
from hf_vicreg.modeling.modeling_bigbird_mae import BigBirdViTMAEForPreTraining
from hf_vicreg.modeling.modeling_bigbird_masked_image import BigBirdViTForMaskedImageModeling
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.modeling.rgb_image import upright_rgb
from hf_vicreg.modeling.visible_patches import draw_masked_patches
from hf_vicreg.training.errors import InputError, blamed_on
from hf_vicreg.training.evaluation.encoder import load_config, load_processor, load_weights, no_model

MEMBERS = 6  # paintings that say how certain the model is
HIDDEN_RATIO = 0.25  # of the visible tiles, hidden from each of them
WRAPPER = "pretraining"  # of a run: where its whole model is
KINDS = {
    "bigbird_vit": BigBirdViTForMaskedImageModeling,
    "bigbird_vit_mae": BigBirdViTMAEForPreTraining,
    "vicreg": VicRegForPreTraining,
}


@dataclass(frozen=True)
class Painting:
    """What was painted.

    Attributes:
        pixel_values: `(1, channels, rows * patch height, columns * patch width)`, as the model takes them.
        pass_of_patch: `(rows, columns)` int64: the pass that painted a patch, from 1; 0 where it was visible.
    """

    pixel_values: torch.Tensor
    pass_of_patch: torch.Tensor


@torch.no_grad()
def paint_patches(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    hidden: torch.Tensor,
    *,
    num_passes: int = 4,
    temperature: float = 0.0,
    seed: int = 0,
) -> Painting:
    """Return an image with its hidden patches painted; what lies there has no influence.

    Args:
        model: A `BigBirdViTForMaskedImageModeling` or `BigBirdViTMAEForPreTraining`, in evaluation mode.
        pixel_values: `(1, channels, height, width)`.
        hidden: `(rows, columns)` bool of patches.
        num_passes: Passes at most; 1 paints all at once.
        temperature: 0 paints what the model expects; 1 draws with the spread of its paintings.
        seed: Of what is hidden to tell how certain it is, and of the draw.

    Raises:
        ValueError: A mask of another grid, of nothing or of everything.
    """
    config = encoder_config(model)
    grid, patch = config.grid_size(*pixel_values.shape[-2:]), config.patch_size_hw
    if tuple(hidden.shape) != grid:
        raise ValueError(f"`hidden`: expected a mask of {grid} patches, got {tuple(hidden.shape)}.")
    if not hidden.any() or hidden.all():
        found = "all" if hidden.all() else "none"
        raise ValueError(f"`mask`: expected some patches to paint and some to see, got {found} of {hidden.numel()}.")
    patches = patchify(pixel_values, patch)
    tiles = tile_of_patches(grid, config.tile_size_hw)
    left, pass_of_patch = hidden.flatten().clone(), torch.zeros(hidden.numel(), dtype=torch.int64)
    for number in range(1, num_passes + 1):
        keys = [f"{seed}/{number}/{member}" for member in range(MEMBERS)]
        masks = torch.stack([left, *(_more_hidden(left, grid, config.tile_size_hw, key) for key in keys)])
        image = unpatchify(patches, grid, patch)
        painted = patchify(model(image.expand(len(masks), -1, -1, -1), bool_masked_pos=masks).reconstruction, patch)
        best, deviations = painted[0], painted[1:] - painted[0]
        spread = deviations.square().mean((0, 2)).cpu()
        waiting = tiles[left].unique()
        spread_of_tile = torch.stack([spread[left & (tiles == tile)].mean() for tile in waiting])
        count = math.ceil(len(waiting) / (num_passes - number + 1))
        chosen = left & torch.isin(tiles, waiting[spread_of_tile.argsort()[:count]])
        if temperature > 0:
            drawn = torch.randint(MEMBERS, (), generator=torch.Generator().manual_seed(seed * 1009 + number))
            best = best + temperature * deviations[int(drawn)]
        patches[0, chosen] = best[chosen].to(patches.dtype)
        pass_of_patch[chosen] = number
        left = left & ~chosen
        if not left.any():
            break
    return Painting(unpatchify(patches, grid, patch), pass_of_patch.view(grid))


def tile_of_patches(grid: tuple[int, int], tile_size: tuple[int, int]) -> torch.Tensor:
    """Return the tile of each patch, `(patches,)` int64."""
    rows, columns = (torch.arange(side) // size for side, size in zip(grid, tile_size, strict=True))
    return (rows[:, None] * (int(columns.max()) + 1) + columns).flatten()


def _more_hidden(hidden: torch.Tensor, grid: tuple[int, int], tile_size: tuple[int, int], key: str) -> torch.Tensor:
    """Hidden patches and a share of the visible tiles; single patches where that would leave nothing to see."""
    for size in (tile_size, (1, 1)):
        if grid[0] > size[0] or grid[1] > size[1]:
            more = hidden | draw_masked_patches(grid, size, HIDDEN_RATIO, f"paint/{key}")
            if not more.all():
                return more
    return hidden


def encoder_config(model: PreTrainedModel):
    """Return the configuration of the encoder."""
    return model.config.encoder if isinstance(model.config, BigBirdViTMAEConfig) else model.config


def load_painter(name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Return a model that paints, in evaluation mode, and its image processor.

    Args:
        name: Folder or Hub id of a model, or the folder of a run with `--objective mae` or `simmim`.

    Raises:
        InputError: No model there, one that does not paint, or one that paints normalised patches.
    """
    whole = str(Path(name) / WRAPPER) if (Path(name) / WRAPPER / "config.json").exists() else name
    kind = KINDS.get(load_config(whole).model_type)
    missing = ["decoder"]
    if kind is not None:
        try:
            model, info = load_weights(kind, whole)
        except (OSError, ValueError) as error:
            raise no_model(whole, error) from error
        missing = sorted(info["missing_keys"])
        if isinstance(model, VicRegForPreTraining):
            missing = ["decoder"] if masked_part(model.objective) is None else []
            model = model if missing else painter_of(model)
    if missing:
        raise InputError(
            f"`MODEL`: expected a model that paints, of a run with --objective mae or simmim, {name} has no weights "
            f"for {missing[0]!r}."
        )
    if getattr(model.config, "norm_pix_loss", False):
        raise InputError(
            f"`MODEL`: expected a model that paints pixels, {name} paints normalised patches (`norm_pix_loss`), whose "
            "mean and deviation nobody knows where the image is hidden; train one without."
        )
    if encoder_config(model).num_channels != 3:
        raise InputError(
            f"`MODEL`: expected a model of images of three colours, {name} takes {encoder_config(model).num_channels} "
            "channels; call `hf_vicreg.painting.paint_patches` on its pixel values."
        )
    return model.eval(), load_processor(name, encoder_config(model))


def paint(
    image: str | Path,
    model: str,
    *,
    mask: str,
    output: str | Path,
    num_passes: int = 4,
    temperature: float = 0.0,
    seed: int = 0,
) -> Painting:
    """Paint the masked part of an image file; the rest of it stays as it is.

    The model paints at the size its processor gives images; what it paints is enlarged to the image's own size.

    Args:
        image: File of an image.
        model: See `load_painter`.
        mask: File of an image of the same size, white (brighter than half) where to paint, or a rectangle
            `"left,top,right,bottom"` in pixels.
        output: File to write, in a format Pillow knows.
        num_passes: As for `paint_patches`, at least 1.
        temperature: As there, at least 0.
        seed: As there.

    Raises:
        InputError: What cannot be read or written, a mask of another size, of nothing or of everything.
    """
    if num_passes < 1:
        raise InputError(f"`--num_passes`: expected at least 1, got {num_passes}.")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"`--temperature`: expected a number of at least 0, got {temperature}.")
    out = Path(output)
    if out.suffix.lower() not in Image.registered_extensions() or not out.absolute().parent.is_dir():
        raise InputError(f"`--output`: expected an image file (.png) in a folder that exists, got {str(output)!r}.")
    picture = _open(image, "IMAGE")
    where = read_mask(mask, picture.size)
    painter, processor = load_painter(model)
    whole: dict[str, Any] = {}
    if getattr(processor, "do_center_crop", None):  # the mask is of the whole image
        height, width = (processor.crop_size[side] for side in ("height", "width"))
        whole = {"do_center_crop": False, "size": {"height": height, "width": width}}
    pixels = processor([picture], return_tensors="pt", **whole)["pixel_values"]
    small = F.adaptive_max_pool2d(where[None, None].float(), tuple(pixels.shape[-2:]))
    config = encoder_config(painter)
    patches = F.max_pool2d(small, config.patch_size_hw, stride=config.patch_stride_hw)[0, 0] > 0
    with blamed_on("--mask"):
        painting = paint_patches(painter, pixels, patches, num_passes=num_passes, temperature=temperature, seed=seed)
    rows, columns = painting.pixel_values.shape[-2:]  # a border may fill no whole patch
    pixels[..., :rows, :columns] = painting.pixel_values
    painted = to_image(pixels, processor).resize(picture.size, Image.Resampling.BICUBIC)
    result = Image.composite(painted, picture, Image.fromarray(where.numpy().astype(np.uint8) * 255))
    with blamed_on("--output", f"expected a file to write, got {str(output)!r}"):
        result.save(out)
    return painting


def read_mask(mask: str, size: tuple[int, int]) -> torch.Tensor:
    """Return where to paint, `(height, width)` bool, of a file or a rectangle.

    Args:
        mask: See `paint`.
        size: Width and height of the image, as Pillow gives them.

    Raises:
        InputError: No file, one of another size, a rectangle that is not in the image, or nothing to paint.
    """
    width, height = size
    found = torch.zeros(height, width, dtype=torch.bool)
    parts = mask.split(",")
    if len(parts) == 4:
        try:
            left, top, right, bottom = (int(part) for part in parts)
        except ValueError:
            left = top = right = bottom = -1
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise InputError(
                f"`--mask`: expected left,top,right,bottom in pixels of an image of {width}x{height}, got {mask!r}."
            )
        found[top:bottom, left:right] = True
        return found
    picture = _open(mask, "--mask")
    if picture.size != size:
        raise InputError(
            f"`--mask`: expected the image's size {width}x{height}, got {picture.size[0]}x{picture.size[1]}."
        )
    found = torch.from_numpy(np.array(picture.convert("L"))) > 127
    if not found.any():
        raise InputError(f"`--mask`: expected white where to paint, {mask} has none.")
    return found


def _open(path: str | Path, field: str) -> Image.Image:
    with blamed_on(field, f"expected a file of an image, got {str(path)!r}"), Image.open(path) as image:
        return upright_rgb(image)


def to_image(pixel_values: torch.Tensor, processor: BaseImageProcessor) -> Image.Image:
    """Return the first of normalised images `(batch, 3, height, width)` as a picture."""
    mean, std = (torch.tensor(one)[:, None, None] for one in (processor.image_mean, processor.image_std))
    pixels = pixel_values[0].float().cpu() * std + mean
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
