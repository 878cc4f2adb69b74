"""Views of measured images: each operation equals its formula, and depends on its key alone."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vicreg.cli import main
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.channels.raster import Raster
from hf_vicreg.training.images.channels.science_views import STAINS, draw_measured, normal_like
from hf_vicreg.training.images.colour import NEUTRAL, finish_views
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.run.arguments import ViewsConfig
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.run.view_presets import VIEW_PRESETS

SCIENCE = ("microscopy", "pathology", "satellite", "medical")


def random_images(count, channels, side=17, seed=0):
    return torch.rand(count, channels, side, side + 4, generator=torch.Generator().manual_seed(seed))


def row(channels, noise=0.0, seed=1.0, gains=None, offsets=None, exponents=None, kept=None, stains=()):
    ones = [1.0] * channels
    return [
        *NEUTRAL,
        noise,
        seed,
        *(gains or ones),
        *(offsets or [0.0] * channels),
        *(exponents or ones),
        *(kept or ones),
        *stains,
    ]


def finished(images, rows):
    """The views of values in [0, 1], not normalised."""
    channels = images.shape[1]
    plain = ([0.0] * channels, [1.0] * channels)
    return finish_views(images, torch.tensor(rows), plain, plain)


def test_gain_offset_and_gamma_are_their_formula():
    images, generator = random_images(3, 5), np.random.default_rng(0)
    gains, offsets, exponents = generator.uniform((0.7, -0.1, 0.7), (1.3, 0.1, 1.4), (3, 5, 3)).transpose(2, 0, 1)
    rows = [
        row(5, gains=gains[one].tolist(), offsets=offsets[one].tolist(), exponents=exponents[one].tolist())
        for one in range(3)
    ]
    by_channel = [one[:, :, None, None] for one in (gains, offsets, exponents)]
    expected = (images.double().numpy() ** by_channel[2] * by_channel[0] + by_channel[1]).clip(0, 1)
    np.testing.assert_allclose(finished(images, rows).numpy(), expected, atol=1e-5)


def test_stain_jitter_is_its_formula_in_optical_density():
    images = random_images(2, 3).clamp(0.02, 1)
    factors, summands = [[1.2, 0.8, 1.1], [0.9, 1.0, 1.3]], [[0.1, -0.1, 0.05], [0.0, 0.2, -0.2]]
    rows = [row(3, stains=[*one, *other]) for one, other in zip(factors, summands, strict=True)]
    found = finished(images, rows).numpy()
    stains = np.array(STAINS) / np.linalg.norm(STAINS, axis=1, keepdims=True)
    for image in range(2):
        for y, x in ((0, 0), (5, 7), (16, 20)):
            density = -np.log(images[image, :, y, x].double().numpy())
            amounts = np.linalg.solve(stains.T, density)  # density = sum of amount times stain
            changed = amounts * factors[image] + summands[image]
            expected = np.exp(-(changed @ stains)).clip(0, 1)
            np.testing.assert_allclose(found[image, :, y, x], expected, atol=1e-5)
    neutral = finished(images, [row(3, stains=[1.0, 1.0, 1.0, 0.0, 0.0, 0.0])] * 2)
    np.testing.assert_allclose(neutral, images, atol=1e-6)


def test_noise_is_normal_keyed_and_kept_within_the_range():
    images = torch.full((2, 4, 100, 100), 0.5)
    found = finished(images, [row(4, noise=0.05, seed=3.0), row(4)])
    assert torch.equal(found[1], images[1])
    noise = (found[0] - 0.5) / 0.05
    # of 40,000 numbers: mean and variance within five of their own deviations
    assert abs(float(noise.mean())) < 5 / 200
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2) / 200
    assert abs(float((noise.abs() < 1).float().mean()) - 0.6827) < 5 * 0.4654 / 200
    assert abs(float((noise.abs() > 3).float().mean()) - 0.0027) < 5 * 0.0519 / 200
    assert abs(float((noise[0] * noise[1]).mean())) < 5 / 100  # channels have their own
    again = normal_like(images[:1], torch.tensor([3.0]))
    assert torch.equal(again, normal_like(images, torch.tensor([9.0, 3.0]))[1:])
    assert not torch.equal(again, normal_like(images[:1], torch.tensor([4.0])))
    assert float(finished(images, [row(4, noise=2.0)] * 2).amax()) == 1


def test_a_dropped_channel_is_its_mean():
    images = random_images(1, 3)
    colours = torch.tensor([row(3, kept=[1.0, 0.0, 1.0])])
    found = finish_views(images, colours, ([0.2, 0.3, 0.4], [0.5, 0.5, 0.5]), ([0.0] * 3, [1.0] * 3))
    assert torch.equal(found[:, 1], torch.zeros_like(found[:, 1]))  # normalised: the mean
    np.testing.assert_allclose(found[:, 0], (images[:, 0] - 0.2) / 0.5, atol=1e-6)
    config = ViewsConfig(channel_dropout_probability=1.0)
    kept = draw_measured(config, 6, random.Random(0))[2 + 18 :]
    assert sum(kept) == 1  # never all of them


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("preset", SCIENCE)
def test_a_view_has_the_same_bits_whatever_it_is_batched_with(preset, channels):
    if preset == "pathology" and channels != 3:
        return  # stains are of RGB; refused, see below
    config = ViewsConfig(**VIEW_PRESETS[preset])
    sampler = ViewSampler.of_views(config, (16, 24))[0]
    pixels = (random_images(6, channels, 40) * 4000).permute(0, 2, 3, 1).numpy().astype(np.uint16)
    drawn = [sampler(Raster.of(one), random.Random(index)) for index, one in enumerate(pixels)]
    assert all(crop.shape == (channels, 16, 24) and crop.dtype == torch.uint16 for crop, _ in drawn)
    crops, colours = torch.stack([one for one, _ in drawn]), torch.tensor([one for _, one in drawn])
    settings = (([0.5] * channels, [0.3] * channels), ([0.0] * channels, [4000.0] * channels))
    together = finish_views(crops, colours, *settings)
    assert together.isfinite().all()
    for one in range(6):
        assert torch.equal(finish_views(crops[one : one + 1], colours[one : one + 1], *settings)[0], together[one])


def test_each_operation_leaves_the_draws_of_the_others_as_they_are():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    plain = ViewSampler.of_views(ViewsConfig(), (32, 32))[0]
    measured = ViewSampler.of_views(ViewsConfig(noise=0.1, gain=0.2), (32, 32))[0]
    for seed in range(4):
        crop, colours = plain(image, random.Random(seed))
        other, more = measured(image, random.Random(seed))
        assert torch.equal(crop, other)
        assert len(colours) == 7
        assert more[:7] == colours


def test_a_view_lies_where_its_place_says_however_it_is_turned():
    y, x = np.mgrid[:60, :90].astype(np.float32) + 0.5
    image = Raster.of(np.stack([x, y], -1))  # each pixel says where it is
    config = ViewsConfig(quarter_turn_probability=0.8, vertical_flip_probability=0.5)
    sampler = ViewSampler.of_views(config, (20, 28))[0]
    rows, columns = torch.meshgrid((torch.arange(20) + 0.5) / 20, (torch.arange(28) + 0.5) / 28, indexing="ij")
    seen = set()
    for seed in range(40):
        crop, _, place = sampler.draw(image, random.Random(seed))
        matrix = torch.tensor(place).view(2, 3) * 90  # units of the longer side
        expected = matrix[:, 0, None, None] * columns + matrix[:, 1, None, None] * rows + matrix[:, 2, None, None]
        # away from the border, where the filter is cut off and a ramp stays a ramp
        assert float((crop - expected)[:, 3:-3, 3:-3].abs().max()) < 0.1  # pixels: the filter is cut into taps
        seen.add(tuple(torch.sign(matrix[:, :2].round(decimals=3)).flatten().tolist()))
    assert len(seen) == 8  # all turns and flips of a rectangle


@pytest.mark.parametrize("preset", sorted(VIEW_PRESETS))
def test_presets_make_a_run(preset):
    config = resolve({"data": "digits", "output_dir": "x", "views": {"preset": preset}})
    assert config.views == ViewsConfig(**VIEW_PRESETS[preset])
    if preset == "medical":
        assert config.views.flip_probability == 0


def test_stains_are_of_rgb():
    with pytest.raises(InputError, match=r"`views.stain`: expected 0 with 5 channels"):
        resolve({"data": "digits", "output_dir": "x", "views": {"preset": "pathology"}, "model": {"num_channels": 5}})


@pytest.mark.parametrize("channels", [2, 3])
def test_a_contact_sheet_shows_each_image_and_its_views(tmp_path, channels):
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 4096, (60, 50, channels), dtype=np.uint16)
        np.save(folder / f"{number}.npy", pixels)
    flags = ["--num_channels", str(channels), "--normalisation", "percentile", "--preset", "microscopy"]
    words = ["inspect", "views", str(folder), str(tmp_path / "sheet.png"), "--image_size", "32", "--num_images", "2"]
    assert not main([*words, *flags])
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (2 * 36, 7 * 36, 3)
    assert pixels[:32, :32].std() > 10
    assert len({pixels[:32, 36 * column : 36 * column + 32].tobytes() for column in range(7)}) == 7


def test_a_preset_leaves_nothing_of_the_one_in_a_recipe_below_it(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("views: {preset: microscopy}")
    above = {"data": "digits", "output_dir": "x", "config": recipe, "views": {"preset": "pathology"}}
    assert resolve(above).views.channel_dropout_probability == 0
    assert resolve(above).views.stain == 0.15


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_corners_from_outside_have_a_value_of_the_image(dtype):
    """0 is black in a photograph, and water on a CT scan."""
    low = {"int16": -1000, "float32": -1000}.get(dtype, 100)
    pixels = np.full((16, 16, 2), low, dtype)
    pixels[8:, :, 1] += 50
    turned = (0.9, 0.4, -3.0, -0.4, 0.9, 3.0)
    found = Raster.of(pixels).transform((16, 16), Image.Transform.AFFINE, turned, Image.Resampling.BILINEAR)
    found = np.asarray(found)
    assert found.dtype == dtype
    assert (found[:, :, 0] == low).all()
    assert found[:, :, 1].min() == low
    assert found[:, :, 1].max() == low + 50
