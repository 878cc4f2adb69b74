"""Both backends give the same pixels, and the automatic class finds them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTImageProcessorPil


def picture(height=40, width=30, mode="RGB"):
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 4, columns * 5, rows + columns], axis=-1) % 256
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_backends_agree(mode):
    size = {"height": 32, "width": 24}
    fast = BigBirdViTImageProcessor(size=size)(picture(mode=mode), return_tensors="pt")["pixel_values"]
    slow = BigBirdViTImageProcessorPil(size=size)(picture(mode=mode), return_tensors="pt")["pixel_values"]
    assert fast.shape == slow.shape == (1, 3, 32, 24)
    # resizing rounds to uint8 in both, not always alike: two grey levels, normalised
    assert (fast - slow).abs().max() < 2.5 / 255 / min(IMAGENET_DEFAULT_STD)


def test_pixels_are_scaled_and_normalised():
    image = picture(32, 32)
    found = BigBirdViTImageProcessor(size={"height": 32, "width": 32})([image], return_tensors="pt")["pixel_values"][0]
    expected = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
    expected = (expected - torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]) / torch.tensor(IMAGENET_DEFAULT_STD)[
        :, None, None
    ]
    torch.testing.assert_close(found, expected)


def test_auto_class_finds_either_backend(tmp_path):
    BigBirdViTConfig().save_pretrained(tmp_path)
    BigBirdViTImageProcessor(size={"height": 48, "width": 64}).save_pretrained(tmp_path)
    fast = AutoImageProcessor.from_pretrained(tmp_path)
    slow = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(fast) is BigBirdViTImageProcessor
    assert type(slow) is BigBirdViTImageProcessorPil
    assert dict(fast.size) == dict(slow.size) == {"height": 48, "width": 64}
