"""Colour operations against torchvision, crops against their definition."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.colour import blur, finish_views, shift_hue
from hf_vicreg.training.images.views import ViewSampler, crop_box
from hf_vicreg.training.run.arguments import ViewsConfig
from hf_vicreg.training.run.flags import parse_flags
from hf_vicreg.training.run.resolve import resolve

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


@pytest.mark.parametrize("size", [(96, 96), (224, 224)], ids=["96", "224"])
def test_all_operations_together_equal_torchvision_one_after_the_other(size):
    """On floats, in our order; 5e-4 of the range, since each operation stretches the difference of the one before."""
    images = crops(12, 8).float()
    images = torch.nn.functional.interpolate(images, size, mode="bilinear").to(torch.uint8)
    sampler = sampler_of(ViewsConfig(grayscale_probability=0.0, solarize_probability=0.0, blur_probability=1.0), size)
    colours = torch.tensor([sampler._draw_colour(random.Random(seed)) for seed in range(12)])
    found = undo_normalisation(finish_views(images, colours))
    for image, colour, view in zip(images.float() / 255, colours, found, strict=True):
        brightness, contrast, saturation, hue, _, sigma, _ = colour.tolist()
        expected = tv.adjust_contrast(tv.adjust_brightness(image, brightness), contrast)
        expected = tv.adjust_hue(tv.adjust_saturation(expected, saturation), hue)
        side = 2 * math.ceil(round(3 * sigma, 5)) + 1
        expected = tv.gaussian_blur(expected, [side, side], [sigma, sigma])
        torch.testing.assert_close(view, expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize("side", [1, 3, 31, 96, 224])
def test_views_are_the_same_bits_whatever_they_are_batched_with(side):
    images = crops(9, side)
    sampler = sampler_of(ViewsConfig(grayscale_probability=0.5, solarize_probability=0.5), (side, side))
    colours = torch.tensor([sampler._draw_colour(random.Random(seed)) for seed in range(9)])
    colours[3] = torch.tensor(NEUTRAL)
    assert 0 < (colours[:, 4] > 0).sum() < 9
    whole = finish_views(images, colours)
    assert whole.isfinite().all()
    for first in (1, 4, 8):
        pieces = [finish_views(images[part], colours[part]) for part in (slice(first), slice(first, None))]
        assert torch.equal(torch.cat(pieces), whole)
    untouched = undo_normalisation(whole[3])
    torch.testing.assert_close(untouched, images[3] / 255, atol=1e-6, rtol=0)


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


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_presets_give_each_view_its_probabilities(preset):
    config = resolve({"output_dir": "out", "train_dir": "images", "views": {"preset": preset}}).views
    samplers = ViewSampler.of_views(config, (224, 224))
    drawn = torch.tensor([[one._draw_colour(random.Random(seed)) for one in samplers] for seed in range(3000)])
    blurred, solarized = (drawn[:, :, 5] > 0).float().mean(0), drawn[:, :, 6].mean(0)
    # facebookresearch/vicreg, augmentations.py: blur 1.0 and 0.1, solarisation 0 and 0.2; the paper: both alike
    expected = {"paper": ([0.5, 0.5], [0.1, 0.1]), "official": ([1.0, 0.1], [0.0, 0.2])}[preset]
    torch.testing.assert_close(blurred, torch.tensor(expected[0]), atol=0.03, rtol=0)
    torch.testing.assert_close(solarized, torch.tensor(expected[1]), atol=0.03, rtol=0)


def test_preset_of_a_layer_wins_over_the_recipe_below_it(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("views: {preset: official, solarize_probability: 0.3}")
    given = {"output_dir": "out", "train_dir": "images", "config": recipe}
    config = resolve(given)
    assert (config.views.blur_probability, config.views.solarize_probability) == ((1.0, 0.1), 0.3)
    assert config.to_recipe()["views"]["blur_probability"] == [1.0, 0.1]  # as YAML and JSON give it back
    assert resolve(config.to_recipe()).views == config.views
    again = resolve(given | parse_flags(["--views.preset", "paper", "--views.blur_probability", "[0.2, 0]"]))
    assert (again.views.blur_probability, again.views.solarize_probability) == ((0.2, 0.0), 0.1)
    for views, message in (
        ({"preset": "own"}, r"`views.preset`: expected one of \['medical', .*'satellite'\], got 'own'"),
        ({"blur_probability": [0.1, 0.2, 0.3]}, "expected a number, or two for the two views"),
        ({"blur_probability": [0.1, 2]}, "`views.blur_probability`: expected a number from 0 to 1"),
        ({"hue": [0.1, 0.2]}, "`views.hue`: expected float"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(given | {"views": views})


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


@pytest.mark.parametrize("turned", [False, True], ids=["upright", "turned"])
def test_a_view_says_where_in_its_image_it_lies(turned):
    # an image whose colours are its coordinates
    height, width = 100, 160
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    image = Image.fromarray(np.stack([x, y, np.full_like(x, 255)], axis=-1).astype(np.uint8))
    extra = {"rotation_degrees": 30.0, "zoom_ratio": 0.2, "translate_ratio": 0.1} if turned else {}
    sampler = ViewSampler.of_views(ViewsConfig(crop_min_ratio=0.2, **extra), (24, 32))[0]
    flips = set()
    for seed in range(8):
        crop, _, place = sampler.draw(image, random.Random(seed))
        matrix = torch.tensor(place).view(2, 3)
        flips.add(bool(matrix[0, 0] < 0))
        columns, rows = torch.meshgrid((torch.arange(32) + 0.5) / 32, (torch.arange(24) + 0.5) / 24, indexing="xy")
        where = torch.einsum("ij,jhw->ihw", matrix, torch.stack([columns, rows, torch.ones(24, 32)])) * width
        inside = crop[2] == 255  # not what a turn has brought in from outside
        inside[[0, -1], :] = inside[:, [0, -1]] = False  # where resizing runs out of pixels
        assert inside.sum() > 100
        assert (crop[:2].float() + 0.5 - where)[:, inside].abs().max() < 2.5
    assert flips == {False, True}
