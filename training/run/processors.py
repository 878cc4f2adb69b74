"""The image processor that a run's features are measured with, and that is saved beside its encoder."""

from typing import Any

from transformers import BaseImageProcessor

from hf_vicreg.modeling.image_processing_bigbird_vit import BigBirdViTImageProcessor
from hf_vicreg.training.run.config import RunConfig


def build_processor(config: RunConfig) -> BaseImageProcessor:
    """Return the image processor saved with the encoder, of the size it is used at; it normalises as the views are."""
    height, width = config.used_image_size
    mean, std = config.normalisation
    settings: dict[str, Any] = {"size": {"height": height, "width": width}, "image_mean": mean, "image_std": std}
    if config.channel_ranges is not None:
        low, high = config.channel_ranges
        settings |= {"channel_low": low, "channel_high": high, "pages": config.run.pages}
        settings |= {"do_rescale": False, "do_convert_rgb": False}  # values are between 0 and 1, and no colours
    return BigBirdViTImageProcessor(**settings)
