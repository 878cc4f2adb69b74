"""Every implementation against the dense oracle, in outputs and gradients, at odd sizes."""

import pytest
import torch

from hf_vicreg.modeling.bigbird_attention import (
    blocks_attention,
    dense_attention,
    eager_attention,
    prefers_blocks,
    sdpa_attention,
)
from hf_vicreg.modeling.bigbird_pattern import BlockPattern, tile_pattern

CASES = [
    pytest.param((1, 1), (8, 8), 0, 1, id="1x1-t8-r0"),
    pytest.param((8, 8), (2, 2), 3, 1, id="8x8-t2-r3"),
    pytest.param((7, 13), (2, 2), 2, 4, id="7x13-t2-r2-g4"),
    pytest.param((7, 13), (3, 4), 0, 1, id="7x13-t3x4-r0"),
    pytest.param((33, 20), (8, 8), 3, 9, id="33x20-t8-r3-g9"),
    pytest.param((5, 5), (8, 8), 3, 2, id="5x5-t8-larger-than-grid"),
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def per_head(pattern: BlockPattern, heads: int) -> BlockPattern:
    """The same grid with a random plan for each head, as the paper draws them."""
    size = pattern.grid
    tile = tuple(-(-one // tiles) for one, tiles in zip(size, pattern.tile_grid, strict=True))
    tables = [tile_pattern(*size, tile_size=tile, num_random_blocks=1, seed=head).neighbours for head in range(heads)]
    slots = max(table.shape[2] for table in tables)
    padded = [torch.nn.functional.pad(table, (0, slots - table.shape[2]), value=-1) for table in tables]
    return BlockPattern(
        grid=pattern.grid,
        tile_grid=pattern.tile_grid,
        num_global_tokens=pattern.num_global_tokens,
        order=pattern.order,
        tile_of_patch=pattern.tile_of_patch,
        neighbours=torch.cat(padded),
    )


def oracle(query, key, value, key_valid, pattern, scaling):
    """Attention written out: softmax over the visible keys of each query."""
    visible = pattern.token_mask()[None].expand(len(query), query.shape[1], -1, -1)
    if key_valid is not None:
        visible = visible & key_valid[:, None, None]
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    weights = torch.where(visible, (scores - scores.amax(-1, keepdim=True)).exp(), 0)
    return torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), value)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("plan", ["shared", "per-head"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("grid", "tile", "num_random", "num_global"), CASES)
def test_implementations_equal_the_oracle(grid, tile, num_random, num_global, padded, plan, dtype):
    heads, batch = 3, 2
    pattern = tile_pattern(*grid, tile_size=tile, num_random_blocks=num_random, num_global_tokens=num_global)
    if plan == "per-head":
        pattern = per_head(pattern, heads)
    tokens = pattern.num_tokens
    inputs = [torch.randn(batch, heads, tokens, 8, dtype=dtype) for _ in range(3)]
    weight = torch.randn(batch, heads, tokens, 8, dtype=dtype)
    key_valid = None
    if padded:
        key_valid = torch.rand(batch, tokens) < 0.7
        key_valid[:, :num_global] = True
        weight = weight * key_valid[:, None, :, None]  # what padding returns means nothing

    def run(function):
        leaves = [one.clone().requires_grad_() for one in inputs]
        output = function(*leaves) * weight
        return output.detach(), torch.autograd.grad(output.sum(), leaves)

    def eager(*tensors):
        return eager_attention(torch.nn.Identity(), *tensors, key_valid, pattern=pattern, scaling=0.3)[0].transpose(
            1, 2
        )

    expected, expected_gradients = run(lambda *tensors: oracle(*tensors, key_valid, pattern, 0.3))
    for name, function in {
        "eager": eager,
        "dense": lambda *tensors: dense_attention(*tensors, key_valid, pattern=pattern, scaling=0.3),
        "blocks": lambda *tensors: blocks_attention(*tensors, key_valid, pattern=pattern, scaling=0.3),
    }.items():
        output, gradients = run(function)
        assert relative(output, expected) < TOLERANCE[dtype], name
        # against the norm of all three: with a single visible key those of query and key are zero but for rounding
        total = torch.stack([gradient.norm() for gradient in expected_gradients]).norm()
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert (gradient - expected_gradient).norm() / total < TOLERANCE[dtype], name


def test_the_oracle_notices_a_missing_link():
    # the comparison above must be able to fail: without its random tiles the pattern gives other numbers
    full = tile_pattern(8, 8, tile_size=(2, 2), num_random_blocks=3)
    less = tile_pattern(8, 8, tile_size=(2, 2), num_random_blocks=0)
    tensors = [torch.randn(1, 1, 65, 8, dtype=torch.float64) for _ in range(3)]
    with_links = oracle(*tensors, None, full, 0.3)
    without = blocks_attention(*tensors, None, pattern=less, scaling=0.3)
    assert relative(without, with_links) > 1e-3


def test_eager_probabilities_follow_the_pattern():
    pattern = tile_pattern(7, 13, tile_size=(2, 2), num_random_blocks=2)
    tensors = [torch.randn(2, 2, pattern.num_tokens, 8) for _ in range(3)]
    _, probabilities = eager_attention(torch.nn.Identity(), *tensors, None, pattern=pattern, scaling=0.3)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 2, pattern.num_tokens))
    assert ((probabilities > 0) == pattern.token_mask()[None]).all()


def test_choice_of_blocks_depends_on_the_pattern_alone():
    large = tile_pattern(64, 64)
    small = tile_pattern(14, 14, tile_size=(4, 4))
    assert prefers_blocks(large)
    assert not prefers_blocks(small)
    assert not prefers_blocks(tile_pattern(64, 64, tile_size=(64, 64)))
    tensors = [torch.randn(1, 1, large.num_tokens, 4, dtype=torch.float64) for _ in range(3)]
    chosen, _ = sdpa_attention(torch.nn.Identity(), *tensors, None, pattern=large, scaling=0.5)
    dense = dense_attention(*tensors, None, pattern=large, scaling=0.5)
    assert relative(chosen.transpose(1, 2), dense) < 1e-10


def test_dropout_is_off_in_evaluation_and_unbiased_in_training():
    pattern = tile_pattern(8, 8, tile_size=(2, 2))
    query, key = (torch.randn(1, 1, 65, 4, dtype=torch.float64) for _ in range(2))
    value = torch.ones(1, 1, 65, 4, dtype=torch.float64)
    for attend in (dense_attention, blocks_attention):
        mean = torch.stack(
            [attend(query, key, value, None, pattern=pattern, scaling=0.3, dropout=0.5).mean() for _ in range(200)]
        ).mean()
        assert mean.item() == pytest.approx(1.0, abs=0.05)
        still = attend(query, key, value, None, pattern=pattern, scaling=0.3)
        torch.testing.assert_close(still, value)
