"""Image processor for BigBirdViT, torchvision backend."""

from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .channel_pixels import BigBirdViTImageProcessorKwargs, ChannelPixelsMixin
from .rgb_image import UprightRgbMixin


class BigBirdViTImageProcessor(ChannelPixelsMixin, UprightRgbMixin, TorchvisionBackend):
    """Turns images into `pixel_values` `(batch, channels, height, width)`: upright RGB, resized, scaled to
    [0, 1], normalised. Each kind of image file gets the pixels that training gave it; see `upright_rgb`. With
    `channel_low` and `channel_high` images have any number of channels; see `ChannelPixelsMixin`."""

    valid_kwargs = BigBirdViTImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012  transformers' own form
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


__all__ = ["BigBirdViTImageProcessor"]
