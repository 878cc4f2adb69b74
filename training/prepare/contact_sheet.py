"""What a model sees of a set of images, as one picture: `hf-vicreg inspect views DATA OUT`."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.channels.channel_source import ChannelSource
from hf_vicreg.training.images.channels.measuring import measured_views, with_signal
from hf_vicreg.training.images.channels.raster import Raster, as_picture
from hf_vicreg.training.images.colour import finish_views
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.images.order import view_rng
from hf_vicreg.training.images.run_images import load_images, usable_images
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.run.resolve import resolve

NUM_VIEWS = 6  # of each image
GAP = 4  # white pixels between pictures


def draw_views(
    data: str | os.PathLike, out: Path, *, num_images: int = 8, image_size: int = 128, seed: int = 0, **flags: Any
) -> Path:
    """Write a PNG with a row for each image: the image as it is read, then views of it as the encoder gets them.

    Of more channels than three the first three are shown, as red, green and blue.

    Args:
        data: As of `pretrain`.
        out: PNG file to write.
        num_images: Rows, spread evenly over all images.
        image_size: Side of a view in pixels.
        seed: Of the views.
        flags: `model`, `views`, `normalisation`, `pages` and `window` of `pretrain`.

    Raises:
        InputError: Flags or images that a run would refuse.
    """
    if num_images < 1:
        raise InputError(f"`num_images`: expected at least 1, got {num_images}.")
    if not Path(out).parent.is_dir() or Path(out).is_dir():
        raise InputError(f"`out`: expected a file in a folder that is there, got {out}.")
    views = {"image_size": image_size} | flags.pop("views", {})
    settings = {"data": os.fspath(data), "output_dir": str(out), "views": views, "seed": seed} | flags
    config = resolve(settings)
    source, _, _ = load_images(config)
    assert isinstance(source, ImageSource)
    if isinstance(source, ChannelSource):
        source = with_signal(source, config)
        settings = measured_views(settings, config, source)
        config = resolve(settings)
    source = usable_images(source, config)
    samplers = ViewSampler.of_views(config.views, config.image_size)[:2] * (NUM_VIEWS // 2)
    rows = []
    for index in source._spread(num_images)[:num_images]:
        image = source.read(index)
        if image is not None:
            rows.append(_row(image, samplers, config, f"{seed}/{index}"))
    Image.fromarray(np.concatenate(rows)).save(out, "PNG")
    return out


def _row(image: Any, samplers: list[ViewSampler], config: RunConfig, key: str) -> np.ndarray:
    """Return the image and its views beside each other, `(height, width, 3)` uint8."""
    height, width = config.image_size
    ranges = config.channel_ranges
    shown = as_picture(image, *(np.asarray(one) for one in ranges or ())).resize((width, height))
    pictures = [np.asarray(shown.convert("RGB"))]
    for turn, sampler in enumerate(samplers):
        crop, colours = sampler(image, view_rng(f"{key}/{turn}", sampler))
        identity = ([0.0] * len(crop), [1.0] * len(crop))  # as the colours leave it, not normalised
        view = finish_views(crop[None], torch.tensor([colours]), identity, ranges)[0]
        pictures.append(np.asarray(as_picture(Raster.of(view.permute(1, 2, 0).numpy()), np.zeros(3), np.ones(3))))
    padded = [np.pad(one, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for one in pictures]
    return np.concatenate(padded, axis=1)
