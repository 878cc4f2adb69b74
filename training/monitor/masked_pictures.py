"""What a method of masked images paints, as one picture in the run's folder: originals, masked, painted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hf_vicreg.modeling.image_patches import patchify, unpatchify
from hf_vicreg.modeling.masked_objectives import masked_part
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.images.streaming import ImageStream

MASKED_FILE = "masked.png"
NUM_IMAGES = 8
LEAST_SIDE = 96  # of an image in the picture, in pixels
GAP = 4
GREY = 0.5


class MaskedPictures:
    """Draws the same few images with the same masks each time; nothing of it reaches the training.

    Attributes:
        pixel_values: `(images, channels, height, width)`, the first usable images, as large as the views.
    """

    def __init__(
        self, model: VicRegForPreTraining, processor: Any, image_size: tuple[int, int], source: ImageSource, path: Path
    ):
        self.model, self.processor, self.path = model, processor, path
        found: list[Image.Image] = []
        for index in range(min(len(source), 4 * NUM_IMAGES)):
            image = source.read(index)
            if image is not None and len(found) < NUM_IMAGES:
                found.append(image)
        size = dict(zip(("height", "width"), image_size, strict=True))
        self.pixel_values = processor(found, size=size, return_tensors="pt")["pixel_values"] if found else None

    def draw(self) -> None:
        """Write the picture; on the main process alone. Models are left in evaluation mode."""
        if self.pixel_values is None:
            return
        objective, encoder = masked_part(self.model.objective), self.model.encoder
        assert objective is not None
        self.model.eval()
        pixel_values = self.pixel_values.to(next(self.model.parameters()).device)
        height, width = pixel_values.shape[-2:]
        keys = [f"picture/{index}" for index in range(len(pixel_values))]
        masks = torch.stack([objective.draw_mask(height, width, key) for key in keys])
        with torch.no_grad():
            painted = objective.paint(encoder, pixel_values, masks).pixels
        patch, grid = encoder.config.patch_size_hw, encoder.config.grid_size(height, width)
        original = patchify(pixel_values, patch).float().cpu()
        hidden = masks[..., None]
        mean, std = (torch.tensor(one)[:, None, None] for one in (self.processor.image_mean, self.processor.image_std))
        grey = ((GREY - mean) / std).flatten().repeat(patch[0] * patch[1])
        rows = [original, torch.where(hidden, grey, original), torch.where(hidden, painted.float().cpu(), original)]
        pictures = [unpatchify(row, grid, patch) * std + mean for row in rows]
        _sheet(pictures).save(self.path)


def _sheet(rows: list[torch.Tensor]) -> Image.Image:
    """Rows of images `(images, 3, height, width)`, in [0, 1], on white, small ones enlarged."""
    height, width = rows[0].shape[-2:]
    times = max(1, -(-LEAST_SIDE // min(height, width)))
    size = (width * times, height * times)
    step_x, step_y = size[0] + GAP, size[1] + GAP
    sheet = Image.new("RGB", (len(rows[0]) * step_x - GAP, len(rows) * step_y - GAP), "white")
    for row, images in enumerate(rows):
        for column, one in enumerate((images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)):
            tile = Image.fromarray(one.contiguous().numpy()).resize(size, Image.Resampling.NEAREST)
            sheet.paste(tile, (column * step_x, row * step_y))
    return sheet


def masked_pictures(
    model: VicRegForPreTraining,
    processor: Any,
    image_size: tuple[int, int],
    source: ImageSource | ImageStream,
    folder: Path,
) -> MaskedPictures | None:
    """Return what draws a run's picture, where one paints; None where images stream by or are not of three colours."""
    if masked_part(model.objective) is None or not isinstance(source, ImageSource):
        return None
    if model.config.encoder.num_channels != 3:
        return None
    return MaskedPictures(model, processor, image_size, source, folder / MASKED_FILE)


def drawn_with(
    pictures: MaskedPictures | None, measure: Callable[[], dict[str, float]] | None, is_main_process: bool
) -> Callable[[], dict[str, float]] | None:
    """Return a measurement that draws as well; None where there is neither."""
    if pictures is None:
        return measure

    def both() -> dict[str, float]:
        if is_main_process:
            pictures.draw()
        return {} if measure is None else measure()

    return both
