"""`hf-vicreg paint`: what is visible stays, what is hidden has no influence, passes, draws, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vicreg import (
    BigBirdViTConfig,
    BigBirdViTForMaskedImageModeling,
    BigBirdViTImageProcessor,
    BigBirdViTMAEConfig,
    BigBirdViTMAEForPreTraining,
    BigBirdViTModel,
)
from hf_vicreg.cli import main
from hf_vicreg.modeling.image_patches import patchify
from hf_vicreg.painting import paint_patches, tile_of_patches

ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 4,
    "tile_size": 2,
}
DECODER = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}


def build(kind, **fields):
    torch.manual_seed(0)
    config = BigBirdViTConfig(**ENCODER)
    if kind == "encoder":
        return BigBirdViTModel(config).eval()
    if kind == "simmim":
        return BigBirdViTForMaskedImageModeling(config).eval()
    return BigBirdViTMAEForPreTraining(BigBirdViTMAEConfig(encoder=config, **DECODER, **fields)).eval()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Models with a processor, one of them as a run has it, an image of 60x40 and a mask."""
    folder = tmp_path_factory.mktemp("painting")
    models = {"simmim": build("simmim"), "encoder": build("encoder"), "normalised": build("mae", norm_pix_loss=True)}
    models["channels"] = BigBirdViTForMaskedImageModeling(BigBirdViTConfig(**ENCODER, num_channels=5))
    for name, model in models.items():
        model.save_pretrained(folder / name)
    build("encoder").save_pretrained(folder / "run")
    build("mae").save_pretrained(folder / "run" / "pretraining")
    for name in (*models, "run"):
        BigBirdViTImageProcessor(size={"height": 32, "width": 34}).save_pretrained(folder / name)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[5:25, 20:50] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:20]).save(folder / "short.png")
    Image.fromarray(mask * 0).save(folder / "black.png")
    Image.fromarray(mask * 0 + 255).save(folder / "white.png")
    return folder


@pytest.fixture(autouse=True)
def _at_work(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def run(*words):
    return main(["paint", "image.png", *words])


@pytest.mark.parametrize("kind", ["simmim", "mae"])
def test_visible_patches_stay_and_hidden_ones_have_no_influence(kind):
    model, pixels = build(kind), torch.randn(1, 3, 28, 36)
    hidden = torch.zeros(7, 9, dtype=torch.bool)
    hidden[1:6, 2:7] = True
    found = paint_patches(model, pixels, hidden, num_passes=3)
    spoilt = pixels.clone()
    spoilt[..., 4:24, 8:28] = 7
    other = paint_patches(model, spoilt, hidden, num_passes=3)
    assert torch.equal(found.pixel_values, other.pixel_values)
    stays = ~hidden.flatten()
    assert torch.equal(patchify(found.pixel_values, (4, 4))[0, stays], patchify(pixels, (4, 4))[0, stays])
    assert torch.equal(found.pass_of_patch > 0, hidden)
    # whole tiles in each pass, 3 of 9 and so on
    tiles = tile_of_patches((7, 9), (2, 2)).view(7, 9)
    pairs = {(int(tile), int(number)) for tile, number in zip(tiles[hidden], found.pass_of_patch[hidden], strict=True)}
    assert len(pairs) == len({tile for tile, _ in pairs}) == 9
    assert [sum(number == one for _, number in pairs) for one in (1, 2, 3)] == [3, 3, 3]


def test_one_pass_is_the_models_own_painting():
    model, pixels = build("mae"), torch.randn(1, 3, 32, 32)
    hidden = torch.zeros(8, 8, dtype=torch.bool)
    hidden[2:5, 2:8] = True
    found = paint_patches(model, pixels, hidden, num_passes=1).pixel_values
    expected = model(pixels, bool_masked_pos=hidden.view(1, -1)).reconstruction
    # alone and in a batch sums may be taken in another order
    torch.testing.assert_close(found[..., 8:20, 8:], expected[..., 8:20, 8:], atol=1e-5, rtol=1e-5)


def test_a_seed_and_a_temperature_draw():
    model, pixels = build("mae"), torch.randn(1, 3, 32, 32)
    hidden = torch.zeros(8, 8, dtype=torch.bool)
    hidden[4:] = True
    drawn = {
        (temperature, seed): paint_patches(model, pixels, hidden, temperature=temperature, seed=seed).pixel_values
        for temperature in (0.0, 1.0)
        for seed in (0, 1, 2)
    }
    assert torch.equal(drawn[1.0, 1], paint_patches(model, pixels, hidden, temperature=1.0, seed=1).pixel_values)
    assert not torch.equal(drawn[1.0, 1], drawn[1.0, 2])
    assert not torch.equal(drawn[0.0, 1], drawn[1.0, 1])


@pytest.mark.parametrize("model", ["simmim", "run"])
def test_the_command_paints_where_the_mask_is_white(model, workplace, capsys):
    assert run(model, "--mask", "mask.png", "--output", "painted.png") == 0
    assert "patches painted in 4 passes" in capsys.readouterr().out
    before, after = (np.asarray(Image.open(name).convert("RGB")) for name in ("image.png", "painted.png"))
    changed = (before != after).any(-1)
    assert not changed[:5].any()
    assert not changed[25:].any()
    assert not changed[:, :20].any()
    assert changed[5:25, 20:50].mean() > 0.9
    assert run(model, "--mask", "20,5,50,25", "--output", "again.png") == 0
    assert (np.asarray(Image.open("again.png")) == after).all()


def test_a_processor_that_crops_has_the_whole_image_painted(workplace):
    """What `convert` takes over from DINOv2 crops the middle; the mask is of the image."""
    shutil.copytree("simmim", "cropping")
    processor = BigBirdViTImageProcessor.from_pretrained("simmim")
    processor.size, processor.do_center_crop = {"height": 40, "width": 44}, True
    processor.crop_size = {"height": 32, "width": 34}
    processor.save_pretrained("cropping")
    for model in ("simmim", "cropping"):
        assert run(model, "--mask", "0,0,20,9", "--output", f"{model}.png") == 0
    assert Path("simmim.png").read_bytes() == Path("cropping.png").read_bytes()


REFUSED = {
    "no mask file": (("simmim", "--mask", "nothing.png"), "`--mask`: expected a file of an image, got 'nothing.png'"),
    "another size": (("simmim", "--mask", "short.png"), "`--mask`: expected the image's size 60x40, got 60x20."),
    "nothing": (("simmim", "--mask", "black.png"), "`--mask`: expected white where to paint, black.png has none."),
    "everything": (("run", "--mask", "white.png"), "`mask`: expected some patches to paint and some to see, got all"),
    "outside": (("simmim", "--mask", "1,1,99,9"), "`--mask`: expected left,top,right,bottom in pixels"),
    "words": (("simmim", "--mask", "a,b,c,d"), "`--mask`: expected left,top,right,bottom in pixels"),
    "no decoder": (("encoder", "--mask", "mask.png"), "`MODEL`: expected a model that paints"),
    "normalised": (("normalised", "--mask", "mask.png"), "`MODEL`: expected a model that paints pixels"),
    "channels": (("channels", "--mask", "mask.png"), "`MODEL`: expected a model of images of three colours"),
    "no model": (("nothing", "--mask", "mask.png"), "`MODEL`"),
    "passes": (("simmim", "--mask", "mask.png", "--num_passes", "0"), "`--num_passes`: expected at least 1, got 0."),
    "temperature": (("simmim", "--mask", "mask.png", "--temperature", "nan"), "`--temperature`: expected a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_told_in_one_line_and_nothing_is_written(name, workplace, capsys):
    words, message = REFUSED[name]
    assert run(*words, "--output", "never.png") == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (workplace / "never.png").exists()


def test_an_output_that_is_no_image_is_refused(capsys):
    assert run("simmim", "--mask", "mask.png", "--output", "painted.txt") == 2
    assert "`--output`: expected an image file (.png)" in capsys.readouterr().err
