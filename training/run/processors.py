"""The image processor that a run's features are measured with, and that is saved beside its encoder."""

from transformers import BaseImageProcessor

from hf_vicreg.modeling.image_processing_bigbird_vit import BigBirdViTImageProcessor
from hf_vicreg.training.run.config import RunConfig


def build_processor(config: RunConfig) -> BaseImageProcessor:
    """Return the image processor saved with the encoder, at its image size; it normalises as the views are."""
    height, width = config.image_size
    mean, std = config.normalisation
    return BigBirdViTImageProcessor(size={"height": height, "width": width}, image_mean=mean, image_std=std)
