"""Images of any channels as `hf-vicreg prepare` stores them: whole ones or windows of them, in their own depth."""

from dataclasses import replace
from io import BytesIO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.channels.channel_source import ChannelSource
from hf_vicreg.training.images.channels.folders import channel_folder
from hf_vicreg.training.images.channels.measuring import without_empty
from hf_vicreg.training.run.places import is_image_folder


def channel_images(source: str, num_channels: int, pages: str | None, window: int | None) -> ChannelSource:
    """Return the images of a folder, larger ones by their windows, of which those that hold nothing are left out.

    What holds nothing is told as in training: by the range of each channel, the 0.5th to the 99.5th percentile.

    Args:
        source: A folder of image files.
        num_channels: Of every image.
        pages: What pages of a file are, `channels` or `images`; None tells it from the number of channels.
        window: Side of a window in pixels; None stores images as they are.

    Raises:
        InputError: No folder of files, nothing to measure, or windows that are all blank.
    """
    for name, value in (("num_channels", num_channels), ("window", window)):
        if value is not None and value < 1:
            raise InputError(f"`{name}`: expected at least 1, got {value}.")
    if not is_image_folder(source):
        raise InputError(f"`source`: expected a folder of image files beside channels or windows, got {source!r}.")
    found = channel_folder(source, num_channels, pages, window)
    refusals = [found.refusal(index) for index in found.sampled()]
    if all(refusals):
        raise InputError(f"`source`: expected readable images in {found.name}; {found.describe(0)}: {refusals[0]}.")
    return found if found.items is None else without_empty(found)


class EncodedChannels(Dataset):
    """Encoded images by index, None for those that cannot be read: PNG of 8-bit RGB, TIFF of anything else."""

    def __init__(self, source: ChannelSource):
        self.source = replace(source, min_size=(1, 1))

    def __getitem__(self, index: int) -> bytes | None:
        image = self.source.read(index)
        return None if image is None else encoded(np.asarray(image))


def encoded(pixels: np.ndarray) -> bytes:
    """Return pixels `(height, width, channels)` as a file that is read as the same, without loss."""
    buffer = BytesIO()
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()
    import tifffile

    planes = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    # OME's metadata name the axes, so that as many rows as channels cannot be taken for each other
    tifffile.imwrite(buffer, planes, ome=True, metadata={"axes": "CYX"}, photometric="minisblack", compression="zlib")
    return buffer.getvalue()
