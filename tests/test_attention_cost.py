"""The costs that are printed, against torch's own counter and a real forward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_vicreg import BigBirdViTConfig
from hf_vicreg.attention_cost import attention_cost, report
from hf_vicreg.modeling import bigbird_attention
from hf_vicreg.modeling.bigbird_attention import prefers_blocks
from hf_vicreg.modeling.bigbird_positions import rotary_tables, with_global_tokens
from hf_vicreg.modeling.block_sparse_attention import block_sparse_attention
from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTLayer, layer_pattern


def make_config(**changes):
    settings = {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "image_size": 64,
        "patch_size": 4,
        "tile_size": 2,
        "num_register_tokens": 2,
    }
    return BigBirdViTConfig(**settings | changes)


def run_layer(config, implementation):
    config._attn_implementation = implementation
    layer, pattern = BigBirdViTLayer(config, 0), layer_pattern(config, 7, 12)
    rotary = with_global_tokens(
        rotary_tables(config.head_dim, 100, None, 7, 12, torch.device("cpu")), pattern.num_global_tokens
    )
    tokens = torch.randn(1, pattern.num_tokens, config.hidden_size, requires_grad=True)
    return layer(tokens, None, pattern, rotary)


def test_flops_equal_those_torch_counts():
    config = make_config()
    with FlopCounterMode(display=False) as counter:
        run_layer(config, "eager").sum().backward()
    cost = attention_cost(config, 28, 48).layer["dense"]
    scores_again = 2 * 87 * 87 * config.hidden_size  # `eager` keeps them, fused attention does not
    assert counter.get_total_flops() == cost.training - scores_again


def test_sparse_flops_follow_the_pairs_of_the_pattern():
    config = make_config()
    cost = attention_cost(config, 28, 48)
    pairs = int(layer_pattern(config, 7, 12).token_mask().sum())
    assert cost.core["sparse"].forward == 4 * pairs * config.hidden_size
    assert cost.layer["dense"].forward - cost.layer["sparse"].forward == 4 * (87**2 - pairs) * config.hidden_size


def test_kept_memory_is_what_a_real_pass_keeps(monkeypatch):
    config = make_config()
    pattern = layer_pattern(config, 7, 12)

    def kept(function):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
            function()
        sizes = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in saved}
        parameters = {one.untyped_storage().data_ptr() for one in saved if isinstance(one, torch.nn.Parameter)}
        return sum(size for where, size in sizes.items() if where not in parameters)

    tensors = [torch.randn(1, 4, 87, 12, requires_grad=True) for _ in range(3)]
    core = kept(lambda: block_sparse_attention(*tensors, None, pattern=pattern, scaling=1.0))
    cost = attention_cost(config, 28, 48)
    assert core == cost.core["sparse"].kept
    full = make_config(attention_type="original_full")
    assert kept(lambda: run_layer(full, "sdpa")) == cost.layer["dense"].kept
    monkeypatch.setattr(bigbird_attention, "PAIR_COST", 0)
    monkeypatch.setattr(bigbird_attention, "TILE_COST", 0)
    assert kept(lambda: run_layer(make_config(), "sdpa")) == cost.layer["sparse"].kept
    with_dropout = attention_cost(make_config(attention_probs_dropout_prob=0.1), 28, 48)
    assert with_dropout.layer == cost.layer


@pytest.mark.parametrize(
    ("changes", "pixels", "words"),
    [
        ({}, 112, "dense attention is the faster form below about"),
        ({"tile_size": 8}, 32, "A smaller `tile_size` would make"),
        ({"attention_layout": "raster"}, 32, "A smaller `block_size` would make"),
        ({"tile_size": 8}, 256, "attention by blocks is the faster form"),
        ({"attention_type": "original_full"}, 1024, "attention is dense at every size"),
        ({"attention_layout": "raster"}, 256, "attention by blocks is the faster form"),
    ],
    ids=["small-tiles", "full", "full-raster", "blocks", "original-full", "raster"],
)
def test_advice_says_what_the_model_does(changes, pixels, words):
    config = make_config(**changes)
    cost = attention_cost(config, pixels, pixels)
    assert words in report(config, pixels, pixels, cost)
    assert cost.uses_blocks == prefers_blocks(layer_pattern(config, *config.grid_size(pixels, pixels)))
    if cost.blocks_from is not None:
        assert prefers_blocks(layer_pattern(config, *config.grid_size(cost.blocks_from, cost.blocks_from)))
