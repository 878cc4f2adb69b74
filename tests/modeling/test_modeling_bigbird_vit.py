"""The encoder as a caller sees it: raster order, agreement of implementations, saving and loading."""

import pytest
import torch
from transformers import AutoModel

from hf_vicreg import BigBirdViTConfig, BigBirdViTModel
from hf_vicreg.modeling import bigbird_attention
from hf_vicreg.modeling.bigbird_blocks import BigBirdViTDropPath
from hf_vicreg.modeling.bigbird_pattern import block_pattern
from hf_vicreg.modeling.bigbird_positions import rotary_tables, rotate, with_global_tokens

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def tiny_config(**changes):
    settings = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 4,
        "tile_size": 2,
        "num_register_tokens": 2,
        "num_random_blocks": 2,
    }
    return BigBirdViTConfig(**settings | changes)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("path", ["dense", "blocks"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grid", [(8, 8), (7, 13), (33, 20)], ids=["8x8", "7x13", "33x20"])
def test_eager_and_sdpa_agree(grid, training, padded, path, dtype, monkeypatch):
    monkeypatch.setattr(bigbird_attention, "PAIR_COST", 0 if path == "blocks" else 10**9)
    monkeypatch.setattr(bigbird_attention, "TILE_COST", 0)
    model = BigBirdViTModel(tiny_config(tile_size=2 if grid[0] < 33 else 8, pooling="mean")).to(dtype)
    model.train(training)
    height, width = grid[0] * 4, grid[1] * 4
    pixel_values = torch.randn(2, 3, height, width, dtype=dtype, requires_grad=True)
    pixel_mask, valid = None, torch.ones(2, *grid, dtype=torch.bool)
    if padded:
        pixel_mask = torch.ones(2, height, width, dtype=torch.int64)
        pixel_mask[0, -9:] = 0
        pixel_mask[1, :, -6:] = 0
        valid[0, -2:] = False  # nine rows of pixels: two of patches, and a third that still counts
        valid[1, :, -1:] = False
    shown = torch.cat([torch.ones(2, 3, dtype=torch.bool), valid.flatten(1)], dim=1)
    weight = torch.randn(2, shown.shape[1], 48, dtype=dtype) * shown[..., None]

    results = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs = model(pixel_values, pixel_mask=pixel_mask, output_hidden_states=True)
        objective = (outputs.last_hidden_state * weight).sum() + outputs.pooler_output.square().sum()
        gradients = torch.autograd.grad(objective, [pixel_values, *model.parameters()])
        results[implementation] = (outputs, gradients)
    (eager, eager_gradients), (sdpa, sdpa_gradients) = results["eager"], results["sdpa"]
    assert relative(sdpa.last_hidden_state[shown], eager.last_hidden_state[shown]) < TOLERANCE[dtype]
    assert relative(sdpa.pooler_output, eager.pooler_output) < TOLERANCE[dtype]
    for one, other in zip(sdpa.hidden_states, eager.hidden_states, strict=True):
        assert relative(one[shown], other[shown]) < TOLERANCE[dtype]
    total = torch.stack([gradient.norm() for gradient in eager_gradients]).norm()
    for one, other in zip(sdpa_gradients, eager_gradients, strict=True):
        assert (one - other).norm() / total < TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_everything_returned_is_in_raster_order(implementation):
    # a model that attends fully is equivariant: it gives the same numbers whatever order its layers work in
    tiled = BigBirdViTModel(tiny_config(window_size=9, tile_size=2)).eval()  # a window over the whole 4x7 tiles
    dense = BigBirdViTModel(tiny_config(attention_type="original_full")).eval()
    dense.load_state_dict(tiled.state_dict())
    tiled.config.window_size = 15
    assert tiled.attention_patterns(28, 52)[0].is_full
    assert not tiled.attention_patterns(28, 52)[0].is_raster
    for model in (tiled, dense):
        model.set_attn_implementation(implementation)
    pixel_values = torch.randn(1, 3, 28, 52)
    flags = {"output_hidden_states": True, "output_attentions": implementation == "eager"}
    found, expected = tiled(pixel_values, **flags), dense(pixel_values, **flags)
    assert len(found.hidden_states) == 4
    for one, other in zip(
        [found.last_hidden_state, *found.hidden_states, *(found.attentions or ())],
        [expected.last_hidden_state, *expected.hidden_states, *(expected.attentions or ())],
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    # and the first hidden state is the patch embedding itself, in raster order
    patches = tiled.embeddings.projection(pixel_values).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.hidden_states[0][:, 3:], patches)


@pytest.mark.parametrize(("top", "left"), [(0, 0), (4, 8), (8, 0)], ids=["after", "around", "above"])
def test_padding_changes_nothing_for_the_image(top, left):
    # an image padded to a larger batch gives the features it has alone, for positions follow its valid area
    settings = {"attention_type": "original_full", "pooling": "mean", "initializer_range": 0.2}
    model = BigBirdViTModel(tiny_config(**settings)).double().eval()
    image = torch.randn(1, 3, 24, 40, dtype=torch.float64)
    canvas = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    canvas[..., top : top + 24, left : left + 40] = image
    mask = torch.zeros(1, 32, 48)
    mask[..., top : top + 24, left : left + 40] = 1
    alone, padded = model(image), model(canvas, pixel_mask=mask)
    torch.testing.assert_close(padded.pooler_output, alone.pooler_output)
    grid = padded.last_hidden_state[:, 3:].view(1, 8, 12, -1)
    grid = grid[:, top // 4 : top // 4 + 6, left // 4 : left // 4 + 10]
    torch.testing.assert_close(grid.flatten(1, 2), alone.last_hidden_state[:, 3:])


def test_a_patch_is_valid_if_any_of_its_pixels_is():
    embeddings = BigBirdViTModel(tiny_config()).embeddings
    mask = torch.zeros(1, 32, 32)
    mask[0, 13, 6] = 1
    assert embeddings.valid_patches(mask).nonzero().tolist() == [[0, 3, 1]]


def test_masked_mean_holds_in_half_precision():
    model = BigBirdViTModel(tiny_config(pooling="mean"))
    patches = torch.full((1, 60 * 41, 48), 30.0, dtype=torch.float16)
    pooled = model._pool(patches[:, :1], patches, torch.ones(1, 60, 41, dtype=torch.bool))
    assert torch.equal(pooled, torch.full((1, 48), 30.0, dtype=torch.float16))


def test_patterns_follow_the_seed_and_the_layer():
    model = BigBirdViTModel(tiny_config(attention_seed=11))
    patterns = model.attention_patterns(28, 52)
    expected = [
        block_pattern(7, 13, tile_size=(2, 2), num_random_blocks=2, num_global_tokens=3, seed=11, layer=layer)
        for layer in range(3)
    ]
    assert all(torch.equal(one.neighbours, other.neighbours) for one, other in zip(patterns, expected, strict=True))
    assert not torch.equal(patterns[0].neighbours, patterns[1].neighbours)


def test_layouts_and_global_tiles_reach_the_patterns():
    raster = BigBirdViTModel(tiny_config(attention_layout="raster", block_size=8)).attention_pattern(32, 32, layer=2)
    assert raster.tile_grid == (1, 8)
    assert raster.global_tiles == (0, 7)
    tiles = BigBirdViTModel(tiny_config(num_global_tiles=2)).attention_pattern(32, 32)
    assert tiles.global_tiles == (9, 11)
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"`layer`: expected 0 to 2, got {layer}"):
            BigBirdViTModel(tiny_config()).attention_pattern(32, 32, layer=layer)
    full = BigBirdViTModel(tiny_config(attention_layout="raster", attention_type="original_full"))
    assert full.attention_pattern(32, 32).is_full


@pytest.mark.parametrize("changes", [{"attention_layout": "raster", "block_size": 8}, {"num_global_tiles": 2}])
def test_implementations_agree_in_other_layouts(changes, monkeypatch):
    monkeypatch.setattr(bigbird_attention, "PAIR_COST", 0)
    monkeypatch.setattr(bigbird_attention, "TILE_COST", 0)
    model = BigBirdViTModel(tiny_config(**changes)).double()
    pixel_values = torch.randn(2, 3, 28, 52, dtype=torch.float64)
    found = model(pixel_values).last_hidden_state
    model.set_attn_implementation("eager")
    assert relative(found, model(pixel_values).last_hidden_state) < 1e-10


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_chosen_by_name():
    model = BigBirdViTModel(tiny_config()).eval()
    pixel_values = torch.randn(1, 3, 28, 52)
    expected = model(pixel_values).last_hidden_state
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        assert relative(model(pixel_values).last_hidden_state, expected) < 2e-5
    with pytest.raises(ValueError, match="for training on a CPU"):
        model(pixel_values)


def test_patterns_can_be_injected():
    model = BigBirdViTModel(tiny_config()).eval()
    pixel_values = torch.randn(1, 3, 32, 32)
    own = model.attention_patterns(32, 32)
    assert torch.equal(
        model(pixel_values, attention_patterns=own).pooler_output,
        model(pixel_values).pooler_output,
    )
    alone = torch.arange(16)[None, :, None]  # each tile sees itself
    others = [pattern.with_neighbours(alone) for pattern in own]
    assert not torch.equal(
        model(pixel_values, attention_patterns=others).pooler_output, model(pixel_values).pooler_output
    )
    with pytest.raises(ValueError, match="`attention_patterns`: expected 3 patterns of grid"):
        model(pixel_values, attention_patterns=own[:2])
    strange = block_pattern(8, 8, tile_size=(4, 4), num_global_tokens=3)
    with pytest.raises(ValueError, match="`attention_patterns`: expected one order of patches"):
        model(pixel_values, attention_patterns=[*own[:2], strange])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_blocks_work_under_autocast(dropout, monkeypatch):
    monkeypatch.setattr(bigbird_attention, "PAIR_COST", 0)
    monkeypatch.setattr(bigbird_attention, "TILE_COST", 0)
    model = BigBirdViTModel(tiny_config(attention_probs_dropout_prob=dropout))
    pixel_values = torch.randn(2, 3, 28, 52)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixel_values).pooler_output
    output.float().square().sum().backward()
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)
    expected = model.eval()(pixel_values).pooler_output
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(pixel_values).pooler_output.float(), expected) < 0.03


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_compiles_cold_as_one_graph():
    torch._dynamo.reset()
    model = BigBirdViTModel(tiny_config(num_hidden_layers=2, attention_seed=77)).eval()
    model.set_attn_implementation("flex_attention")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for height, width in ((32, 32), (28, 52)):
        pixel_values = torch.randn(2, 3, height, width)
        with torch.no_grad():
            found = compiled(pixel_values).last_hidden_state
            assert relative(found, model(pixel_values).last_hidden_state) < 1e-5
    torch._dynamo.reset()


def test_exports_and_serves_the_same_patterns_afterwards():
    model = BigBirdViTModel(tiny_config(attention_seed=2000)).eval()
    pixel_values = torch.randn(1, 3, 28, 52)
    exported = torch.export.export(model, (pixel_values,), strict=False)
    expected = model(pixel_values).last_hidden_state  # the tables made while tracing are real ones
    assert relative(exported.module()(pixel_values).last_hidden_state, expected) < 1e-5


def test_configuration_reaches_the_modules():
    assert BigBirdViTModel(tiny_config(qkv_bias=False)).encoder.layer[0].attention.k_proj.bias is None
    near, far = (rotary_tables(16, theta, None, 4, 4, torch.device("cpu")) for theta in (10, 1000))
    assert not torch.equal(near[0], far[0])
    model = BigBirdViTModel(tiny_config(initializer_range=0.5, num_register_tokens=8))
    assert model.embeddings.cls_token.std() > 0.2
    assert model.embeddings.register_tokens.std() > 0.2


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_acts_in_training_only(name):
    model = BigBirdViTModel(tiny_config(**{name: 0.5}))
    pixel_values = torch.randn(2, 3, 32, 32)
    model.eval()
    assert torch.equal(model(pixel_values).pooler_output, model(pixel_values).pooler_output)
    model.train()
    assert not torch.equal(model(pixel_values).pooler_output, model(pixel_values).pooler_output)


def test_drop_path_keeps_the_mean_sample_by_sample():
    states = torch.randn(64, 5, 3)
    dropped = BigBirdViTDropPath(0.75).train()(states)
    kept = dropped.abs().sum((1, 2)) > 0
    assert 4 <= kept.sum() <= 30
    torch.testing.assert_close(dropped[kept], states[kept] * 4)


def test_outputs_are_named_whatever_the_configuration_says():
    model = BigBirdViTModel(tiny_config(return_dict=False)).eval()
    assert len(model(torch.randn(1, 3, 32, 32))) == 2
    assert len(BigBirdViTModel(tiny_config(output_attentions=True))(torch.zeros(1, 3, 32, 32)).attentions) == 3


def test_rotary_attention_depends_on_relative_position_only():
    cos, sin = rotary_tables(16, 100, None, 5, 6, torch.device("cpu"))
    assert cos.shape == (1, 1, 30, 16)
    query, key = (torch.randn(16, dtype=torch.float64).expand(1, 1, 30, 16) for _ in range(2))
    scores = (rotate(query, cos.double(), sin.double()) @ rotate(key, cos.double(), sin.double()).mT).view(5, 6, 5, 6)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[3, 2, 4, 4], atol=1e-5, rtol=1e-5)
    assert (scores[0, 0, 1, 2] - scores[0, 0, 2, 1]).abs() > 1e-3


def test_global_tokens_are_not_rotated():
    tables = with_global_tokens(rotary_tables(16, 100, None, 5, 6, torch.device("cpu")), 3)
    tokens = torch.randn(2, 3, 33, 16)
    rotated = rotate(tokens, *tables)
    assert torch.equal(rotated[:, :, :3], tokens[:, :, :3])
    assert not torch.equal(rotated[:, :, 3:], tokens[:, :, 3:])
    assert rotate(tokens.bfloat16(), *tables).dtype == torch.bfloat16  # as autocast has it


@pytest.mark.parametrize(
    ("stride", "tokens"),
    [(None, 64), (4, 64), (3, 100), ((2, 4), 15 * 8)],
    ids=["none", "whole", "overlap", "rectangular"],
)
def test_patches_overlap_by_the_stride(stride, tokens):
    model = BigBirdViTModel(tiny_config(patch_stride=stride)).eval()
    assert model(torch.randn(2, 3, 32, 32)).last_hidden_state.shape == (2, 3 + tokens, 48)


def test_overlapping_patches_see_shared_pixels():
    model = BigBirdViTModel(tiny_config(patch_size=8, patch_stride=4)).eval()
    pixel_values = torch.zeros(1, 3, 32, 32)
    changed = pixel_values.clone()
    changed[..., 10, 10] = 1.0  # inside the patches that start at 4 and 8 in each direction
    difference = (
        model(changed, output_hidden_states=True).hidden_states[0]
        - model(pixel_values, output_hidden_states=True).hidden_states[0]
    )
    moved = difference[0, 3:].abs().sum(-1).view(7, 7) > 0
    assert moved.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


def test_pooling():
    for pooling in ("cls", "mean"):
        model = BigBirdViTModel(tiny_config(pooling=pooling)).eval()
        outputs = model(torch.randn(2, 3, 32, 32))
        last = outputs.last_hidden_state
        expected = last[:, 0] if pooling == "cls" else last[:, 3:].mean(1)
        torch.testing.assert_close(outputs.pooler_output, expected)


@pytest.mark.parametrize("layerscale", [None, 0.1], ids=["plain", "layerscale"])
def test_save_and_load_are_bitwise_equal(tmp_path, layerscale):
    model = BigBirdViTModel(tiny_config(layerscale_value=layerscale)).eval()
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 28, 52)
    for again in (AutoModel.from_pretrained(tmp_path), BigBirdViTModel.from_pretrained(tmp_path)):
        assert type(again) is BigBirdViTModel
        assert torch.equal(again(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)
    assert (tmp_path / "model.safetensors").exists()


def test_gradient_checkpointing_gives_the_same_gradients():
    model = BigBirdViTModel(tiny_config()).double().train()
    pixel_values = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain = torch.autograd.grad(model(pixel_values).pooler_output.square().sum(), list(model.parameters()))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    saved = torch.autograd.grad(model(pixel_values).pooler_output.square().sum(), list(model.parameters()))
    for one, other in zip(plain, saved, strict=True):
        torch.testing.assert_close(one, other)


def test_drop_path_drops_whole_samples_in_training_only():
    model = BigBirdViTModel(tiny_config(drop_path_rate=0.9))
    pixel_values = torch.randn(2, 3, 32, 32)
    assert [layer.drop_path.rate for layer in model.encoder.layer] == pytest.approx([0.0, 0.45, 0.9])
    model.eval()
    assert torch.equal(model(pixel_values).pooler_output, model(pixel_values).pooler_output)
    model.train()
    assert not torch.equal(model(pixel_values).pooler_output, model(pixel_values).pooler_output)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(), "`pixel_values`: expected a tensor"),
        (lambda model: model(torch.zeros(1, 1, 32, 32)), "3 channels"),
        (lambda model: model(torch.zeros(1, 3, 3, 32)), "at least one patch"),
        (lambda model: model(torch.zeros(1, 3, 32, 32), pixel_mask=torch.ones(1, 8, 8)), "`pixel_mask`: expected"),
        (lambda model: model(torch.zeros(1, 3, 8, 8), pixel_mask=[[[1] * 8] * 8]), "`pixel_mask`: .* got list"),
        (lambda model: model(torch.zeros(1, 3, 8, 8), pixel_mask=torch.ones(1, 8, 8) * 1j), "got torch.complex64"),
    ],
    ids=["none", "channels", "too-small", "mask-shape", "mask-list", "mask-complex"],
)
def test_bad_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(BigBirdViTModel(tiny_config()))


def test_other_attention_implementations_are_refused():
    # an upstream implementation would ignore the pattern and attend densely
    model = BigBirdViTModel(tiny_config())
    for name in ("flash_attention_2", "unknown"):
        with pytest.raises(ValueError, match=r"(?i)attention"):
            BigBirdViTModel._from_config(tiny_config(), attn_implementation=name)
        model.config._attn_implementation = name
        with pytest.raises(ValueError, match="`attn_implementation`: expected one of"):
            model(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 50}, "`hidden_size`: expected a multiple"),
        ({"window_size": 2}, "`window_size`: expected an odd"),
        ({"patch_stride": 5}, "`patch_stride`: expected at most"),
        ({"drop_path_rate": 1.0}, "`drop_path_rate`: expected a probability"),
        ({"num_random_blocks": -1}, "`num_random_blocks`: expected at least 0"),
        ({"num_global_tiles": -1}, "`num_global_tiles`: expected at least 0"),
        ({"block_size": 0}, "`block_size`: expected at least 1"),
        ({"attention_layout": "hexagons"}, "attention_layout"),
        ({"tile_size": 0}, "`tile_size`: expected a positive"),
        ({"rope_theta": 0}, "`rope_theta`: expected a number above 0"),
        ({"hidden_act": "foo"}, "`hidden_act`: expected an activation"),
        ({"pooling": "max"}, "pooling"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**changes)


def test_returned_states_and_probabilities_have_gradients():
    """They are in raster order and still what the next layer reads, although layers work on tiles."""
    model = BigBirdViTModel(tiny_config()).double()
    model.set_attn_implementation("eager")
    pixel_values = torch.randn(2, 3, 28, 52, dtype=torch.float64)
    plain = model(pixel_values)
    outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(outputs.last_hidden_state, plain.last_hidden_state)

    recorded = [*outputs.hidden_states, *outputs.attentions]
    gradients = torch.autograd.grad(outputs.last_hidden_state.square().sum(), recorded)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    # the last hidden state goes through the layer norm alone: its gradient is in the same order of tokens
    last = outputs.hidden_states[-1].detach().requires_grad_()
    (expected,) = torch.autograd.grad(model.layernorm(last).square().sum(), last)
    torch.testing.assert_close(gradients[len(outputs.hidden_states) - 1], expected)
