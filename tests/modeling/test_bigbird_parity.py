"""Against transformers' BigBird for text: with its random plan injected, ours is the same function."""

import numpy as np
import pytest
import torch
from transformers import BigBirdConfig, BigBirdModel
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdSelfAttention

from hf_vicreg.modeling.bigbird_pattern import block_pattern
from hf_vicreg.modeling.block_sparse_attention import block_sparse_attention
from hf_vicreg.modeling.dense_attention import dense_attention
from hf_vicreg.modeling.gathered_attention import gathered_attention

HEADS, HEAD_DIM, BLOCK, RANDOM = 3, 8, 16, 2


@pytest.fixture
def numpy_state():
    # its training forward seeds NumPy's global generator
    state = np.random.get_state()
    yield
    np.random.set_state(state)


def peer(kind, **arguments):
    config = BigBirdConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        block_size=BLOCK,
        num_random_blocks=RANDOM,
        attention_probs_dropout_prob=0.0,
    )
    return kind(config, **arguments).train()


def projections(layer, hidden):
    return [
        projection(hidden).view(len(hidden), -1, HEADS, HEAD_DIM).transpose(1, 2)
        for projection in (layer.query, layer.key, layer.value)
    ]


def plan_of(layer, blocks):
    """The layer's table `(heads, blocks, slots)`: window of three, and the random blocks that its seed gives."""
    tokens = blocks * BLOCK
    np.random.seed(layer.seed)
    lengths, counts = layer._get_rand_attn_plan(tokens, BLOCK, RANDOM)
    drawn = layer._bigbird_block_rand_mask_with_head(
        tokens, tokens, BLOCK, BLOCK, HEADS, plan_from_length=lengths, plan_num_rand_blocks=counts
    )
    rows = [
        [
            sorted({row - 1, row, row + 1} & set(range(blocks)))
            + (drawn[head][row - 1].tolist() if 0 < row < blocks - 1 else [])
            for row in range(blocks)
        ]
        for head in range(HEADS)
    ]
    slots = max(len(row) for head in rows for row in head)
    return torch.tensor([[row + [-1] * (slots - len(row)) for row in head] for head in rows])


@pytest.mark.parametrize("blocks", [12, 14, 21])  # its planner fails on 8
@pytest.mark.parametrize("attend", [dense_attention, gathered_attention, block_sparse_attention])
def test_block_sparse_layer_is_the_same_function(attend, blocks, numpy_state):
    layer = peer(BigBirdBlockSparseAttention, seed=5)
    hidden = torch.randn(2, blocks * BLOCK, HEADS * HEAD_DIM, requires_grad=True)
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(2, blocks * BLOCK), BLOCK
    )
    expected, _ = layer(hidden, band, from_mask, to_mask, blocked, blocked)

    pattern = block_pattern(1, blocks * BLOCK, layout="raster", block_size=BLOCK, num_global_tokens=0)
    pattern = pattern.with_neighbours(plan_of(layer, blocks))
    found = attend(*projections(layer, hidden), None, pattern=pattern, scaling=HEAD_DIM**-0.5)
    found = found.transpose(1, 2).reshape(expected.shape)
    assert (found - expected).norm() / expected.norm() < 1e-5

    weight = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), [hidden, *layer.parameters()])
    for gradient, wanted in zip(
        torch.autograd.grad((found * weight).sum(), [hidden, *layer.parameters()]), expected_gradients, strict=True
    ):
        # the key's bias has no gradient but rounding
        assert (gradient - wanted).norm() < 1e-5 * max(wanted.norm(), expected_gradients[0].norm())


def test_original_full_is_the_same_function():
    layer = peer(BigBirdSelfAttention)
    hidden = torch.randn(2, 96, HEADS * HEAD_DIM)
    expected, _ = layer(hidden)
    pattern = block_pattern(8, 12, tile_size=(8, 12), num_random_blocks=0, num_global_tokens=0)
    found = dense_attention(*projections(layer, hidden), None, pattern=pattern, scaling=HEAD_DIM**-0.5)
    assert (found.transpose(1, 2).reshape(expected.shape) - expected).norm() / expected.norm() < 1e-5
