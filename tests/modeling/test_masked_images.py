"""SimMIM and MAE: their authors' formulas, masks of all kinds, saving, and what they refuse."""

import copy
import json
import sys

import pytest
import torch
from transformers import (
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    ViTConfig,
    ViTForMaskedImageModeling,
    dynamic_module_utils,
)

from hf_vicreg import (
    BigBirdViTConfig,
    BigBirdViTForMaskedImageModeling,
    BigBirdViTMAEConfig,
    BigBirdViTMAEForPreTraining,
    BigBirdViTModel,
    VicRegForPreTraining,
)
from hf_vicreg.modeling.image_patches import patchify, unpatchify
from hf_vicreg.modeling.visible_patches import draw_masked_patches
from hf_vicreg.publishing.custom_code import write_custom_code

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 4,
    "tile_size": 2,
    "num_register_tokens": 1,
    "num_random_blocks": 1,
}
DECODER = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24}
SIZE, GRID = (28, 53), (7, 13)  # a column of pixels is left out


def make_simmim(**changes):
    torch.manual_seed(0)
    return BigBirdViTForMaskedImageModeling(BigBirdViTConfig(**ENCODER | changes))


def make_mae(encoder=None, **changes):
    torch.manual_seed(0)
    return BigBirdViTMAEForPreTraining(BigBirdViTMAEConfig(encoder=ENCODER | (encoder or {}), **DECODER | changes))


def images(count=3, dtype=torch.float32, size=SIZE):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def masks(*keys, grid=GRID, ratio=0.75):
    return torch.stack([draw_masked_patches(grid, (2, 2), ratio, key) for key in keys])


@pytest.mark.parametrize("patch", [(4, 4), (2, 5)])
def test_patches_and_back(patch):
    pixels = images()
    patches = patchify(pixels, patch)
    rows, columns = SIZE[0] // patch[0], SIZE[1] // patch[1]
    assert torch.equal(
        unpatchify(patches, (rows, columns), patch), pixels[..., : rows * patch[0], : columns * patch[1]]
    )
    row, column = 1, 2
    top, left = row * patch[0], column * patch[1]
    one = pixels[:, :, top : top + patch[0], left : left + patch[1]]
    assert torch.equal(patches[:, row * columns + column], one.permute(0, 2, 3, 1).flatten(1))


def test_simmim_equals_transformers_own():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        image_size=32,
        patch_size=4,
        encoder_stride=4,
    )
    vit = ViTForMaskedImageModeling(config).double().eval()
    torch.nn.init.normal_(vit.vit.embeddings.mask_token)
    encoder = BigBirdViTModel.from_dense(vit.vit.float()).double()
    vit = vit.double()
    ours = BigBirdViTForMaskedImageModeling(encoder.config).double().eval()
    ours.bigbird_vit.load_state_dict({name: one for name, one in encoder.state_dict().items() if "pooler" not in name})
    with torch.no_grad():
        ours.head.mask_token.copy_(vit.vit.embeddings.mask_token[0, 0])
        conv = vit.decoder[0]  # channels are (3, 4, 4), colour first
        ours.head.decoder.weight.copy_(conv.weight.view(3, 4, 4, 32).permute(1, 2, 0, 3).reshape(48, 32))
        ours.head.decoder.bias.copy_(conv.bias.view(3, 4, 4).permute(1, 2, 0).flatten())
    pixels = images(2, torch.float64, (32, 32))
    masked = masks("a", "b", grid=(8, 8), ratio=0.5)
    expected, found = vit(pixels, bool_masked_pos=masked), ours(pixels, bool_masked_pos=masked)
    torch.testing.assert_close(found.reconstruction, expected.reconstruction, atol=1e-10, rtol=1e-10)
    # its denominator has 1e-5 beside the 1,024 pixels: 1e-8
    torch.testing.assert_close(found.loss, expected.loss, atol=0, rtol=2e-8)
    assert ours(pixels).loss is None
    assert torch.equal(ours(pixels, bool_masked_pos=masked.long()).loss, found.loss)


def official_mae_loss(pixels, prediction, masked, norm_pix_loss):
    """The authors' formula, on patches `(rows, columns)` of 4x4 pixels, colour last."""
    batch, rows, columns = len(pixels), *GRID
    target = pixels[..., : rows * 4, : columns * 4].reshape(batch, 3, rows, 4, columns, 4)
    target = torch.einsum("nchpwq->nhwpqc", target).reshape(batch, rows * columns, 48)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1.0e-6) ** 0.5
    loss = ((prediction - target) ** 2).mean(-1)
    return (loss * masked).sum() / masked.sum()


@pytest.mark.parametrize("norm_pix_loss", [False, True], ids=["pixels", "normalised"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_mae_loss_and_gradients_equal_the_authors_formula(dtype, tolerance, norm_pix_loss):
    model = make_mae(norm_pix_loss=norm_pix_loss).to(dtype)
    pixels, masked = images(dtype=dtype), masks("a").expand(3, -1)
    painted = []
    model.decoder.prediction.register_forward_hook(lambda _module, _inputs, output: painted.append(output))
    outputs = model(pixels, bool_masked_pos=masked)
    expected = official_mae_loss(pixels, painted[0], masked.to(dtype), norm_pix_loss)
    torch.testing.assert_close(outputs.loss, expected, atol=0, rtol=tolerance)
    parameters = list(model.parameters())
    found, wanted = (torch.autograd.grad(one, parameters, retain_graph=True) for one in (outputs.loss, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    patches = patchify(pixels[..., :52], (4, 4))
    if norm_pix_loss:
        wanted = painted[0] * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    else:
        wanted = painted[0]
    torch.testing.assert_close(patchify(outputs.reconstruction, (4, 4)), wanted)


def test_mae_sees_nothing_of_what_is_masked():
    model, pixels, masked = make_mae().eval(), images(), masks("a").expand(3, -1)
    hidden = torch.nn.functional.interpolate(masked.view(3, 1, *GRID).float(), scale_factor=4) > 0
    changed = pixels.clone()
    changed[..., :52] = torch.where(hidden, torch.randn(()), pixels[..., :52])
    one, other = model(pixels, bool_masked_pos=masked), model(changed, bool_masked_pos=masked)
    assert torch.equal(one.reconstruction, other.reconstruction)
    assert torch.equal(one.representations, other.representations)
    assert one.loss != other.loss


def test_mae_with_a_mask_for_each_image_equals_image_after_image():
    model = make_mae().double().eval()
    pixels, masked = images(5, torch.float64), masks("a", "b", "a", "c", "b")
    masked[3] = masks("c", ratio=0.3)
    together = model(pixels, bool_masked_pos=masked)
    alone = [model(pixels[[index]], bool_masked_pos=masked[[index]]) for index in range(5)]
    for name in ("reconstruction", "representations"):
        expected = torch.cat([getattr(one, name) for one in alone])
        torch.testing.assert_close(getattr(together, name), expected, atol=1e-10, rtol=1e-10)
    # each image counts alike, whatever its mask hides
    torch.testing.assert_close(together.loss, torch.stack([one.loss for one in alone]).mean())
    assert torch.equal(together.mask, masked.long())
    with pytest.raises(ValueError, match="expected one mask for all images, got 3"):
        model(pixels, bool_masked_pos=masked, output_hidden_states=True)


def test_mae_draws_a_mask_for_the_batch():
    model, pixels = make_mae(), images()
    drawn = [model(pixels).mask for _ in range(2)]
    assert not torch.equal(*drawn)
    assert all(torch.equal(one[0], one[2]) for one in drawn)
    assert drawn[0].view(3, *GRID)[:, :6, :12].float().mean() == pytest.approx(0.75, abs=0.1)
    model.eval()
    assert torch.equal(model(pixels).reconstruction, model(pixels).reconstruction)
    finer = make_mae(mask_tile_size=[1, 3], mask_ratio=0.5)(pixels).mask[0].view(GRID)
    assert all(len(set(three.tolist())) == 1 for row in finer for three in row.split(3))


def test_masks_are_kept_within_bounds():
    model, pixels = make_mae().eval(), images(1)
    model.decoder._visible.max_bytes = 0
    for key in "abc":
        model(pixels, bool_masked_pos=masks(key))
    assert len(model.decoder._visible) == 1
    assert len(copy.deepcopy(model).decoder._visible) == 0
    model.double()
    assert len(model.decoder._visible) == 0


@pytest.mark.parametrize(
    ("make", "auto"), [(make_simmim, AutoModelForMaskedImageModeling), (make_mae, AutoModelForPreTraining)]
)
def test_saved_and_loaded(make, auto, tmp_path):
    model, pixels, masked = make().eval(), images(), masks("a", "b", "a")
    model.save_pretrained(tmp_path / "model")
    loaded = auto.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(model)
    expected = model(pixels, bool_masked_pos=masked)
    found = loaded(pixels, bool_masked_pos=masked)
    assert torch.equal(found.reconstruction, expected.reconstruction)
    assert torch.equal(found.loss, expected.loss)


def test_the_hubs_custom_code_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    pixels = images()
    for make, auto in ((make_simmim, "AutoModelForMaskedImageModeling"), (make_mae, "AutoModelForPreTraining")):
        model, folder = make().eval(), tmp_path / make.__name__
        model.save_pretrained(folder)
        write_custom_code(folder, [folder / "config.json"])
        named = json.loads((folder / "config.json").read_text())["auto_map"][auto]
        loaded = dynamic_module_utils.get_class_from_dynamic_module(named, folder).from_pretrained(folder)
        assert type(loaded).__module__.startswith("transformers_modules.")
        masked = masks("a", "b", "a")
        found, expected = (one(pixels, bool_masked_pos=masked).reconstruction for one in (loaded, model))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_encoder_is_a_common_one(tmp_path):
    simmim, mae = make_simmim().eval(), make_mae().eval()
    simmim.save_pretrained(tmp_path / "simmim")
    mae.encoder.save_pretrained(tmp_path / "encoder")
    pixels = images()
    for model, folder in ((simmim.bigbird_vit, "simmim"), (mae.encoder, "encoder")):
        loaded = BigBirdViTModel.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(loaded(pixels).pooler_output, model(pixels).pooler_output)
    VicRegForPreTraining.from_encoder_pretrained(tmp_path / "encoder", expander_sizes=[8, 8])


def test_padding_counts_for_nothing_in_simmim():
    model, pixels = make_simmim().eval(), images(2)
    masked, pixel_mask = masks("a", "b"), torch.ones(2, *SIZE)
    pixel_mask[1, 12:] = 0
    changed = pixels.clone()
    changed[1, :, 12:] = 9
    one, other = (model(some, bool_masked_pos=masked, pixel_mask=pixel_mask).loss for some in (pixels, changed))
    torch.testing.assert_close(one, other)
    assert model(pixels, bool_masked_pos=torch.zeros(2, 91, dtype=torch.bool)).loss == 0


REFUSED = {
    "another size": (masks("a", grid=(8, 8)), r"`bool_masked_pos`: expected bool \(batch, patches\) \(1, 91\)"),
    "floats": (torch.zeros(1, 91), "got torch.float32"),
    "no tensor": ([True], "got list"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("make", [make_simmim, make_mae])
def test_masks_that_do_not_fit_are_refused_in_one_line(make, name):
    masked, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        make()(images(1), bool_masked_pos=masked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_ratio": 1}, r"`mask_ratio`: expected a share of the tiles in \(0, 1\), got 1"),
        ({"mask_ratio": 0.0}, "`mask_ratio`"),
        ({"mask_tile_size": 0}, "`mask_tile_size`: expected at least 1"),
        ({"decoder_hidden_size": 20}, "`decoder_hidden_size`: expected a multiple of 4 times"),
        ({"decoder_num_hidden_layers": 0}, "`decoder_num_hidden_layers`: expected at least 1"),
        (
            {"encoder": {"model_type": "resnet"}},
            "`encoder`: expected a 'bigbird_vit', .* without batch norms, got 'resnet'",
        ),
        ({"encoder": {"patch_size": 4, "patch_stride": 2}}, "`patch_stride`: expected `patch_size`"),
    ],
)
def test_configurations_that_cannot_be_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        BigBirdViTMAEConfig(**fields)


def test_all_masked_and_overlapping_patches_are_refused():
    with pytest.raises(ValueError, match="expected at least one visible patch"):
        make_mae()(images(1), bool_masked_pos=torch.ones(1, 91, dtype=torch.bool))
    model = make_simmim(patch_stride=2)
    with pytest.raises(ValueError, match="patches that overlap show what is masked"):
        model(images(1), bool_masked_pos=torch.ones(1, 91, dtype=torch.bool))
    with pytest.raises(TypeError, match="`mask`"):
        make_mae()(images(1), mask=1)
