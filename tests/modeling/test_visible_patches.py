"""An encoder that runs on the visible patches alone equals the whole one with everything hidden masked."""

import pytest
import torch

from hf_vicreg import BigBirdViTConfig, BigBirdViTModel
from hf_vicreg.modeling import bigbird_attention
from hf_vicreg.modeling.grid_plan import rotary_in_order
from hf_vicreg.modeling.visible_patches import draw_masked_patches, visible_pattern, visible_patterns

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}  # sums over other lengths round otherwise
PATCH = 4
PLACES = {
    "rope": {"position_embedding_type": "rope"},
    "table": {"position_embedding_type": "absolute", "pooling": "cls"},
    "raster": {"attention_layout": "raster", "block_size": 7},
    "full": {"attention_type": "original_full"},
}


def make_model(**changes):
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "image_size": 32,
        "patch_size": PATCH,
        "tile_size": 2,
        "num_register_tokens": 2,
        "num_random_blocks": 2,
        "num_global_tiles": 1,
    }
    torch.manual_seed(0)
    return BigBirdViTModel(BigBirdViTConfig(**settings | changes))


def whole_model_that_sees(model, pixel_values, visible, valid):
    """The oracle: all tokens go through all layers, and no query sees a hidden patch; visible tokens are returned."""
    config, patterns = model.config, model.attention_patterns(*pixel_values.shape[-2:])
    num_global = 1 + config.num_register_tokens
    shown = torch.cat([torch.ones(num_global, dtype=torch.bool), visible])
    tokens = model.embeddings(pixel_values, valid)
    order = torch.cat([torch.arange(num_global), patterns[0].order + num_global])
    keys = shown[order].expand(len(tokens), -1)
    if valid is not None:
        keys = keys & torch.nn.functional.pad(valid.flatten(1), (num_global, 0), value=True)[:, order]
    theta = config.rope_theta if config.position_embedding_type == "rope" else None
    rotary = rotary_in_order(patterns[0], None, order, valid, config.head_dim, theta, tokens.device)
    rotary = None if rotary is None else tuple(one.to(tokens.dtype) for one in rotary)
    encoded = model.encoder(tokens[:, order], keys, patterns, rotary).last_hidden_state[:, order.argsort()]
    return model.layernorm(encoded)[:, shown]


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("path", ["dense", "blocks", "gathered"])
@pytest.mark.parametrize(
    ("grid", "ratio", "by_tile", "padded", "dtype"),
    [
        ((7, 13), 0.75, True, False, torch.float64),
        ((8, 8), 0.5, False, True, torch.float64),
        ((9, 5), 0.6, True, True, torch.float64),
        ((7, 13), 0.75, False, False, torch.float32),
    ],
    ids=["7x13-tiles", "8x8-patches-padded", "9x5-tiles-padded", "7x13-patches-fp32"],
)
def test_the_visible_encoder_equals_the_whole_one_that_sees_no_hidden_patch(
    grid, ratio, by_tile, padded, dtype, path, places, monkeypatch
):
    monkeypatch.setattr(bigbird_attention, "PAIR_COST", 10**9 if path == "dense" else 0)
    monkeypatch.setattr(bigbird_attention, "TILE_COST", 0)
    if path == "gathered":
        monkeypatch.setattr(bigbird_attention, "_exporting", lambda: True)
    model = make_model(**PLACES[places]).to(dtype).train()
    height, width = grid[0] * PATCH, grid[1] * PATCH
    pixel_values = torch.randn(2, 3, height, width, dtype=dtype, requires_grad=True)
    visible = ~draw_masked_patches(grid, (2, 2) if by_tile else (1, 1), ratio, "oracle")
    pixel_mask = valid = None
    if padded:
        pixel_mask = torch.ones(2, height, width, dtype=torch.int64)
        pixel_mask[1, :, -2 * PATCH :] = 0
        valid = model.embeddings.valid_patches(pixel_mask)
    shown = torch.ones(2, int(visible.sum()), dtype=torch.bool) if valid is None else valid.flatten(1)[:, visible]
    weight = torch.randn(2, 3 + shown.shape[1], 32, dtype=dtype)
    weight[:, 3:] *= shown[..., None]

    patterns = visible_patterns(tuple(model.attention_patterns(height, width)), visible)
    outputs = model(pixel_values, pixel_mask, attention_patterns=patterns)
    expected = whole_model_that_sees(model, pixel_values, visible, valid)
    used = list(model.parameters())
    found_gradients = torch.autograd.grad((outputs.last_hidden_state * weight).sum(), [pixel_values, *used])
    expected_gradients = torch.autograd.grad((expected * weight).sum(), [pixel_values, *used])
    assert outputs.last_hidden_state.shape == expected.shape
    assert (weight.ne(0) * (outputs.last_hidden_state - expected)).norm() / expected.norm() < TOLERANCE[dtype]
    total = torch.stack([gradient.norm() for gradient in expected_gradients]).norm()
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        assert (one - other).norm() / total < TOLERANCE[dtype]
    if model.config.pooling == "mean":
        patches = outputs.last_hidden_state[:, 3:]
        pooled = torch.stack([one[seen].mean(0) for one, seen in zip(patches, shown, strict=True)])
        torch.testing.assert_close(outputs.pooler_output, pooled)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_recorded_states_are_those_of_visible_tokens(implementation):
    model = make_model().eval()
    model.set_attn_implementation(implementation)
    pixel_values = torch.randn(1, 3, 28, 52)
    visible = ~draw_masked_patches((7, 13), (2, 2), 0.75, "states")
    patterns = visible_patterns(tuple(model.attention_patterns(28, 52)), visible)
    plain = model(pixel_values, attention_patterns=patterns)
    recorded = model(pixel_values, attention_patterns=patterns, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(plain.last_hidden_state, recorded.last_hidden_state, atol=1e-5, rtol=1e-5)
    tokens = 3 + int(visible.sum())
    assert {one.shape for one in recorded.hidden_states} == {(1, tokens, 32)}
    assert {one.shape for one in recorded.attentions} == {(1, 2, tokens, tokens)}
    embedded = model.embeddings(pixel_values)
    expected = torch.cat([embedded[:, :3], embedded[:, 3:][:, visible]], dim=1)
    torch.testing.assert_close(recorded.hidden_states[0], expected)


def test_visible_tiles_keep_their_links_and_no_others():
    pattern = make_model().attention_pattern(28, 52)
    visible = ~draw_masked_patches((7, 13), (2, 2), 0.6, "links")
    cut = visible_pattern(pattern, visible)
    stays = visible[pattern.order]
    assert torch.equal(cut.token_mask()[0, 3:, 3:], pattern.token_mask()[0, 3:, 3:][stays][:, stays])
    assert sorted(cut.order.tolist()) == visible.nonzero()[:, 0].tolist()
    assert cut.num_tiles == 11  # of 28, 17 are masked
    everything = visible_pattern(pattern, torch.ones_like(visible))
    assert torch.equal(everything.order, pattern.order)
    assert torch.equal(everything.token_mask(), pattern.token_mask())


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.75, 0.99])
def test_masks_are_whole_tiles_and_follow_from_their_key(ratio):
    masked = draw_masked_patches((7, 13), (2, 4), ratio, "a")
    assert torch.equal(masked, draw_masked_patches((7, 13), (2, 4), ratio, "a"))
    assert masked.dtype == torch.bool
    assert masked.shape == (91,)
    tiles = [tile for rows in masked.view(7, 13).split(2) for tile in rows.split(4, dim=1) if tile.any()]
    assert all(bool(tile.all()) for tile in tiles)
    assert len(tiles) == min(max(round(ratio * 16), 1), 15)


def test_masks_of_one_key_are_the_same_on_every_machine():
    found = draw_masked_patches((4, 4), (2, 2), 0.5, "0/0")
    assert found.int().tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1]  # a golden draw
    counts = sum(draw_masked_patches((4, 4), (1, 1), 0.75, f"0/{step}").int() for step in range(400))
    # 400 draws of 0.75 have a deviation of 8.7: five of them
    assert (counts - 300).abs().max() < 44


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, float("nan")])
def test_ratios_outside_are_refused(ratio):
    with pytest.raises(ValueError, match=r"`mask_ratio`: expected a share of the tiles in \(0, 1\)"):
        draw_masked_patches((4, 4), (2, 2), ratio, "a")


def test_a_mask_leaves_something_visible():
    with pytest.raises(ValueError, match="`mask_tile_size`: expected at least two tiles"):
        draw_masked_patches((4, 4), (8, 8), 0.5, "a")
    patterns = tuple(make_model().attention_patterns(28, 52))
    with pytest.raises(ValueError, match="expected at least one visible patch"):
        visible_patterns(patterns, torch.zeros(91, dtype=torch.bool))
