"""Images of a page: many as one, and views as a run's model saw them."""

from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedConfig

from hf_vicreg.hub_space.pictures import fitted, image_of
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.colour import Normalisation, finish_views
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.images.order import ViewDataset, draw_views
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.run.arguments import ViewsConfig
from hf_vicreg.training.run.settings import typed

MAX_SIDE = 1024  # in pixels, of a view that is drawn
THUMBNAIL = 40  # side in pixels, of a map's


def atlas(images: list[Image.Image], side: int = THUMBNAIL) -> tuple[Image.Image, int]:
    """Return all images as one, each in a square of `side` pixels, and how many stand in a row."""
    columns = max(1, min(len(images), 25))
    sheet = Image.new("RGB", (columns * side, -(-len(images) // columns) * side), (128, 128, 128))
    for place, image in enumerate(images):
        small = fitted(image, side)
        if max(small.size) < side:
            scale = side / max(small.size)
            small = small.resize([max(1, round(scale * one)) for one in small.size], Image.Resampling.NEAREST)
        left, top = place % columns * side, place // columns * side
        sheet.paste(small, (left + (side - small.width) // 2, top + (side - small.height) // 2))
    return sheet, columns


def views_config(recipe: dict[str, Any]) -> ViewsConfig:
    """Return how a recipe draws views.

    Raises:
        InputError: It names none that can be drawn.
    """
    return ViewsConfig(**typed(ViewsConfig, recipe.get("views") or {}, "views."))


def normalisation_of(processor: Any) -> Normalisation:
    """Return an image processor's mean and deviation of each of three channels."""
    mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    return tuple(
        [float(one) for one in value] if isinstance(value, list | tuple) and len(value) == 3 else [default] * 3
        for value, default in ((mean, 0.0), (std, 1.0))
    )  # type: ignore[return-value]


def drawn_views(
    source: ImageSource, places: list[int], recipe: dict[str, Any], encoder: PreTrainedConfig, norm: Normalisation
) -> list[list[Image.Image]]:
    """Return the views of some images in a run's first pass over them, the two global ones first.

    Args:
        source: The run's images.
        places: Which of them.
        recipe: The run's settings.
        encoder: The encoder's configuration, for the size of the views.
        norm: The image processor's, by which the views are normalised and shown again.

    Raises:
        InputError: Views that cannot be drawn.
    """
    config = views_config(recipe)
    size = config.image_size or getattr(encoder, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    if max(height, width, config.local_image_size) > MAX_SIDE:
        raise InputError(f"`views.image_size`: expected at most {MAX_SIDE} pixels to be shown, got {(height, width)}.")
    seed = recipe.get("seed")
    dataset = ViewDataset(source, ViewSampler.of_views(config, (height, width)), seed if isinstance(seed, int) else 0)
    rows = []
    for place in places:
        sample = dataset[(0, place)]
        if sample["views"] is None:
            continue
        crops = [*sample["views"], *sample.get("local_views", [])]
        rows.append([_shown(crop, colour, norm) for crop, colour in zip(crops, sample["colours"], strict=True)])
    return rows


def _shown(crop: torch.Tensor, colour: torch.Tensor, norm: Normalisation) -> Image.Image:
    return image_of(finish_views(crop[None], colour[None], norm)[0], *map(list, norm))


def views_of(image: Image.Image, views: dict[str, Any], image_size: int, count: int, seed: int) -> list[Image.Image]:
    """Return `count` views of an RGB image, as `show_views` describes them."""
    config = views_config({"views": views})
    size = config.image_size or image_size
    height, width = (size, size) if isinstance(size, int) else size
    norm: Normalisation = ([0.0] * 3, [1.0] * 3)
    found = []
    for turn in range(-(-count // 2)):
        drawn = draw_views(ViewSampler.of_views(config, (height, width))[:2], image, f"{seed}/{turn}")
        found += [_shown(crop, colour, norm) for crop, colour in zip(drawn["views"], drawn["colours"], strict=True)]
    return found[:count]
