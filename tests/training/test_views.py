"""Colour operations against torchvision, crops against their definition."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_vicreg.training.colour import blur, finish_views, shift_hue
from hf_vicreg.training.config import ViewsConfig
from hf_vicreg.training.views import ViewSampler, crop_box

NEUTRAL = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def sampler_of(config, image_size):
    return ViewSampler.of_views(config, image_size)[0]


def crops(count=3, size=20):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def undo_normalisation(views):
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return views * std + mean


@pytest.mark.parametrize(
    ("column", "value", "reference"),
    [
        (0, 1.3, lambda image: tv.adjust_brightness(image, 1.3)),
        (1, 0.6, lambda image: tv.adjust_contrast(image, 0.6)),
        (2, 1.2, lambda image: tv.adjust_saturation(image, 1.2)),
        (3, 0.09, lambda image: tv.adjust_hue(image, 0.09)),
        (3, -0.4, lambda image: tv.adjust_hue(image, -0.4)),
        (4, 1.0, lambda image: tv.rgb_to_grayscale(image, num_output_channels=3)),
        (6, 1.0, lambda image: tv.solarize(image, 0.5)),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "hue-back", "grayscale", "solarize"],
)
def test_operations_equal_torchvision(column, value, reference):
    images = crops()
    colours = torch.tensor([NEUTRAL] * 3)
    colours[1, column] = value
    found = undo_normalisation(finish_views(images, colours))
    expected = images.float() / 255
    expected[1] = reference(expected[1])
    # torchvision rounds the grey weights to four digits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_blur_equals_torchvision():
    images = torch.rand(2, 3, 224, 224)
    found = blur(images, torch.tensor([0.0, 1.7]))
    assert torch.equal(found[0], images[0])
    expected = tv.gaussian_blur(images[1], kernel_size=[13, 13], sigma=[1.7, 1.7])
    torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=0)


def test_hue_of_greys_stays():
    greys = torch.rand(2, 1, 4, 4).expand(-1, 3, -1, -1)
    torch.testing.assert_close(shift_hue(greys, torch.full((2, 1, 1, 1), 0.3)), greys)


def test_crop_boxes_follow_their_distribution():
    rng = random.Random(0)
    boxes = [crop_box(100, 80, (0.2, 1.0), rng) for _ in range(4000)]
    for left, top, width, height in boxes:
        assert left >= 0 <= top
        assert left + width <= 100
        assert top + height <= 80
        assert 0.19 < width * height / 8000 <= 1
        assert 0.72 < width / height < 1.39
    shares = np.array([width * height / 8000 for _, _, width, height in boxes])
    assert 0.5 < shares.mean() < 0.6  # uniform on (.2, 1), large ones in odd shapes rejected
    assert crop_box(1, 1, (0.08, 1.0), rng) == (0, 0, 1, 1)
    assert crop_box(1000, 3, (0.9, 1.0), rng) == (498, 0, 4, 3)


def test_view_equals_cropping_by_hand():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    crop, _ = sampler_of(ViewsConfig(flip_probability=1.0), (16, 16))(image, random.Random("key"))
    left, top, width, height = crop_box(50, 40, (0.08, 1.0), random.Random("key"))
    pixels = torch.from_numpy(np.array(image)[top : top + height, left : left + width]).permute(2, 0, 1)
    expected = tv.resize(pixels, [16, 16], antialias=True).flip(2)
    assert (crop.int() - expected.int()).abs().max() <= 1


def test_affine_moves_turns_and_zooms():
    image = Image.new("RGB", (33, 33))
    image.putpixel((16, 16), (255, 255, 255))
    settings = {"crop_min_ratio": 1.0, "flip_probability": 0.0}
    still, _ = sampler_of(ViewsConfig(**settings, rotation_degrees=90), (33, 33))(image, random.Random(0))
    assert still[0].argmax() == 16 * 33 + 16  # the centre stays where it is
    for seed in range(5):
        sampler = sampler_of(ViewsConfig(**settings, translate_ratio=0.3), (33, 33))
        moved, _ = sampler(image, random.Random(seed))
        row, column = divmod(int(moved[0].argmax()), 33)
        assert abs(row - 16) <= 0.3 * 33 + 1
        assert abs(column - 16) <= 0.3 * 33 + 1
    block = Image.new("RGB", (64, 64))
    block.paste((255, 255, 255), (24, 24, 40, 40))
    areas = [
        (sampler_of(ViewsConfig(**settings, zoom_ratio=0.5), (64, 64))(block, random.Random(seed))[0][0] > 127).sum()
        for seed in range(30)
    ]
    assert 60 < min(areas) < 160 < 350 < max(areas) < 600  # sides from 8 to 24 pixels


def test_probabilities_are_respected():
    sampler = sampler_of(ViewsConfig(), (224, 224))
    drawn = torch.tensor([sampler._draw_colour(random.Random(seed)) for seed in range(3000)])
    assert (drawn[:, 4].mean() - 0.2).abs() < 0.03
    assert ((drawn[:, 5] > 0).float().mean() - 0.5).abs() < 0.04
    assert (drawn[:, 6].mean() - 0.1).abs() < 0.03
    assert ((drawn[:, 0] != 1).float().mean() - 0.8).abs() < 0.03
    assert drawn[:, 0].min() >= 0.6
    assert drawn[:, 0].max() <= 1.4
    assert drawn[:, 5].max() <= 2.0


def test_local_views_are_small_crops_of_their_own_size():
    config = ViewsConfig(num_local_views=3, local_image_size=12, local_crop_min_ratio=0.1, local_crop_max_ratio=0.2)
    samplers = ViewSampler.of_views(config, (32, 24))
    assert [sampler.image_size for sampler in samplers] == [(32, 24)] * 2 + [(12, 12)] * 3
    # a view of a ramp spans as much of it as the crop is wide
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1))).convert("RGB")
    for index, (low, high) in ((0, (0.08, 1)), (2, (0.1, 0.2))):
        spans = []
        for seed in range(200):
            crop = samplers[index](ramp, random.Random(seed))[0][0].float()
            spans.append((crop.max() - crop.min()).item() / 200)
        assert (0.75 * low) ** 0.5 * 0.8 < min(spans)
        assert max(spans) < (4 / 3 * high) ** 0.5 + 0.02
