"""What image processors do with images of any number of channels: read, scale by channel, resize."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import get_image_size_for_max_height_width
from transformers.processing_utils import ImagesKwargs

from .channel_files import channels_of_picture, open_channels
from .channel_layout import ChannelFile, axes_of_array


class BigBirdViTImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What an image processor of any number of channels has beside others.

    channel_low (`list[float]`, *optional*):
        Value of each channel that becomes 0. Without it images are RGB.
    channel_high (`list[float]`, *optional*):
        Value of each channel that becomes 1.
    pages (`str`, *optional*):
        What the pages of a file are: `channels`, or `images`, of which the first is taken.
    """

    channel_low: list[float] | None
    channel_high: list[float] | None
    pages: str | None


def scaled(pixels: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
    """Return `(value - low) / (high - low)`, kept within 0 and 1.

    Args:
        pixels: `(..., channels, height, width)` of any depth.
        low: One number a channel.
        high: The same, each above `low`.

    Returns:
        float32 of the same shape.
    """
    low, high = (torch.tensor(list(one), dtype=torch.float64, device="cpu") for one in (low, high))
    factor, offset = (1 / (high - low)).float(), low.float()
    offset, factor = (one.to(pixels.device)[:, None, None] for one in (offset, factor))
    return (pixels.to(torch.float32) - offset).mul_(factor).clamp_(0, 1)


def array_of(image: Any, num_channels: int, pages: str | None = None, data_format: str | None = None) -> np.ndarray:
    """Return one image `(height, width, channels)` in its own depth.

    Args:
        image: A path, a picture of Pillow's, or an array or tensor, whose channels come first or last.
        num_channels: That it shall have.
        pages: As in `open_channels`.
        data_format: Of an array: `channels_first`, `channels_last`, or None to tell it from the shape.

    Raises:
        ValueError: It has other channels, or an array holds several images.
    """
    if isinstance(image, str):
        return open_channels(image, num_channels, pages).read()
    if isinstance(image, Image.Image):
        return channels_of_picture(image, num_channels, pages).read()
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    named = {"channels_first": "CYX", "channels_last": "YXC"}.get(str(getattr(data_format, "value", data_format)))
    axes = named if named is not None and array.ndim == 3 else axes_of_array(array.shape, num_channels)
    found = ChannelFile([array], axes, num_channels, pages)
    if found.num_images > 1:
        raise ValueError(
            f"`images`: expected one image of {num_channels} channel(s), got an array {list(array.shape)} of "
            f"{found.num_images} images; give them as a list."
        )
    return found.read()


class ChannelPixelsMixin:
    """Gives an image processor `channel_low` and `channel_high`; where they are set, images have as many channels.

    Then images are files, arrays or tensors of any depth; they are scaled by channel (`scaled`), resized, and
    normalised by `image_mean` and `image_std`. A detector's are padded to `pad_size` as well.
    """

    channel_low = None
    channel_high = None
    pages = None

    def fetch_images(self, images: Any) -> Any:
        """Return images as they were given, files opened; one or nested lists of them."""
        if self.channel_low is None:
            return super().fetch_images(images)  # type: ignore[misc]
        if isinstance(images, list | tuple):
            return [self.fetch_images(one) for one in images]
        if isinstance(images, os.PathLike | str) and os.path.exists(images):
            return os.fspath(images)  # read in `process_image`: the file knows its axes
        return super().fetch_images(images) if isinstance(images, str) else images

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> Any:
        """Return a flat list of images."""
        if self.channel_low is None:
            return super()._prepare_images_structure(images, expected_ndims=expected_ndims)  # type: ignore[misc]
        found = self.fetch_images(images)
        if isinstance(found, list):
            return [one for each in found for one in (each if isinstance(each, list) else [each])]
        batch = isinstance(found, np.ndarray | torch.Tensor) and found.ndim == 4
        return list(found) if batch else [found]

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> Any:
        """Return one image as the backend's array or tensor, channels first."""
        low, high = kwargs.get("channel_low"), kwargs.get("channel_high")
        if low is None:
            return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)  # type: ignore[misc]
        pixels = array_of(image, len(low), kwargs.get("pages"), kwargs.get("input_data_format"))
        tensor = scaled(torch.from_numpy(np.array(pixels)).permute(2, 0, 1), low, high).contiguous()
        if self.backend == "pil":  # type: ignore[attr-defined]
            return tensor.numpy()
        device = kwargs.get("device")
        return tensor if device is None else tensor.to(device)

    def _preprocess(
        self, images: Any, *args: Any, do_pad: bool | None, pad_size: Any, return_tensors: Any, **kwargs: Any
    ) -> BatchFeature:
        """Return `pixel_values` and, where images are padded, `pixel_mask` `(batch, height, width)`, 0 in padding."""
        preprocess = super()._preprocess  # type: ignore[misc]
        if self.channel_low is None or not do_pad:
            return preprocess(images, *args, do_pad=do_pad, pad_size=pad_size, return_tensors=return_tensors, **kwargs)
        found = preprocess(images, *args, do_pad=False, pad_size=pad_size, return_tensors=None, **kwargs)
        padded = self.pad(found["pixel_values"], pad_size=pad_size, return_mask=True)
        return BatchFeature(dict(zip(("pixel_values", "pixel_mask"), padded, strict=True)), tensor_type=return_tensors)

    def post_process_object_detection(self, outputs: Any, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """Return `scores`, `labels` and `boxes` of each image, as `DeformableDetrImageProcessor` does."""
        from transformers import DeformableDetrImageProcessor

        return DeformableDetrImageProcessor.post_process_object_detection(self, outputs, *args, **kwargs)


class ChannelPlanesMixin(ChannelPixelsMixin):
    """The same for Pillow's backend, which resizes images of any number of channels plane by plane."""

    def resize(self, image: np.ndarray, size: Any, resample: Any = None, **kwargs: Any) -> np.ndarray:
        """Return an image `(channels, height, width)` at another size."""
        height, width = size.height, size.width
        if size.max_height and size.max_width:
            height, width = get_image_size_for_max_height_width(image.shape[1:], size.max_height, size.max_width)
        if self.channel_low is None or not (height and width):
            return super().resize(image, size, resample=resample, **kwargs)  # type: ignore[misc]
        planes = [Image.fromarray(plane).resize((width, height), resample) for plane in image]
        return np.stack([np.asarray(plane) for plane in planes])
