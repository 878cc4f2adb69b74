"""Image processor for BigBirdViT, PIL backend."""

from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


class BigBirdViTImageProcessorPil(PilBackend):
    """Turns images into `pixel_values` `(batch, 3, height, width)`: RGB, resized, scaled to [0, 1], normalised."""

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012  transformers' own form
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


__all__ = ["BigBirdViTImageProcessorPil"]
