"""Every implementation against the dense oracle, in outputs and gradients, at odd sizes."""

import gc
import random

import pytest
import torch

from hf_vicreg.modeling import flex_block_attention as flex_block_attention_module
from hf_vicreg.modeling.bigbird_attention import eager_attention, flex_attention, prefers_blocks, sdpa_attention
from hf_vicreg.modeling.bigbird_pattern import BlockPattern, block_pattern
from hf_vicreg.modeling.block_sparse_attention import block_sparse_attention
from hf_vicreg.modeling.dense_attention import dense_attention
from hf_vicreg.modeling.flex_block_attention import flex_block_attention, flex_block_size
from hf_vicreg.modeling.gathered_attention import gathered_attention

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def draw(seed: int) -> dict:
    """A case at random: grid, layout, tiles, levels, heads of the table, padding."""
    rng = random.Random(seed)
    longest = rng.choice((4, 12, 40))
    height, width = rng.randint(1, longest), rng.randint(1, longest)
    return {
        "grid": (height, width),
        "arguments": {
            "layout": rng.choice(("tiles", "tiles", "raster")),
            "tile_size": (rng.randint(1, 9), rng.randint(1, 9)) if height * width < 500 else (8, rng.randint(4, 8)),
            "block_size": rng.choice((4, 16, 64)) if height * width < 500 else 64,
            "window_size": rng.choice((1, 3, 3, 5)),
            "num_random_blocks": rng.randint(0, 5),
            "num_global_tiles": rng.choice((0, 0, 1, 3)),
            "num_global_tokens": rng.choice((0, 1, 1, 2, 5, 9)),
        },
        "batch": rng.randint(1, 3),
        "heads": rng.randint(1, 3),
        "plan": rng.choice(("shared", "per-head")),
        "padded": rng.random() < 0.5,
        "head_dim": rng.choice((4, 8, 12, 20)),
    }


CASES = {
    "one-token": draw(0) | {"grid": (1, 1)},
    **{
        f"{height}x{width}-{'padded' if padded else 'whole'}": {
            "grid": (height, width),
            "arguments": {"tile_size": (2, 2) if height < 9 else (8, 8), "num_global_tokens": 3},
            "batch": 2,
            "heads": 2,
            "plan": "shared",
            "padded": padded,
        }
        for height, width in ((8, 8), (7, 13), (33, 20))
        for padded in (False, True)
    },
    **{
        f"tiles-of-{tile}-{'padded' if padded else 'whole'}": {
            "grid": (40, 33),
            "arguments": {"tile_size": (tile, tile), "num_random_blocks": 0, "window_size": 1, "num_global_tiles": 1},
            "batch": 2,
            "heads": 1,
            "plan": "shared",
            "padded": padded,
        }
        for tile in (14, 29)  # torch's kernel divides longer queries in other ways
        for padded in (False, True)
    },
    **{f"drawn-{seed}": draw(seed) for seed in range(1, 45)},
}


def make_pattern(case: dict) -> BlockPattern:
    """The case's pattern; per head: the same grid with other random tiles for each head, as the paper draws them."""
    pattern = block_pattern(*case["grid"], **case["arguments"])
    if case["plan"] == "shared":
        return pattern
    tables = [block_pattern(*case["grid"], **case["arguments"], seed=head).neighbours for head in range(case["heads"])]
    slots = max(table.shape[2] for table in tables)
    padded = [torch.nn.functional.pad(table, (0, slots - table.shape[2]), value=-1) for table in tables]
    return pattern.with_neighbours(torch.cat(padded))


def oracle(query, key, value, key_valid, pattern, scaling):
    """Attention written out: softmax over the visible keys of each query; zeros where there are none."""
    visible = pattern.token_mask()[None].expand(len(query), query.shape[1], -1, -1)
    if key_valid is not None:
        visible = visible & key_valid[:, None, None]
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    weights = torch.where(visible, (scores - scores.amax(-1, keepdim=True)).exp(), 0)
    total = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.einsum("bhqk,bhkd->bhqd", weights / total, value)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def eager(*tensors, pattern, scaling):
    return eager_attention(torch.nn.Identity(), *tensors, pattern=pattern, scaling=scaling)[0].transpose(1, 2)


IMPLEMENTATIONS = {
    "eager": eager,
    "dense": dense_attention,
    "gathered": gathered_attention,
    "block-sparse": block_sparse_attention,
}


def compare_with_the_oracle(case, dtype, implementations):
    pattern = make_pattern(case)
    heads, batch, tokens, head_dim = case["heads"], case["batch"], pattern.num_tokens, case.get("head_dim", 8)
    # as the model hands them over: views of (batch, tokens, heads, head_dim)
    inputs = [torch.randn(batch, tokens, heads, head_dim, dtype=dtype).transpose(1, 2) for _ in range(3)]
    weight = torch.randn(batch, heads, tokens, head_dim, dtype=dtype)
    key_valid = None
    if case["padded"]:
        key_valid = torch.rand(batch, tokens) < 0.7
        key_valid[:, : pattern.num_global_tokens] = True
        weight = weight * key_valid[:, None, :, None]  # what padding returns means nothing

    def run(function):
        leaves = [one.clone().requires_grad_() for one in inputs]
        output = function(*leaves) * weight
        return output.detach(), torch.autograd.grad(output.sum(), leaves)

    expected, expected_gradients = run(lambda *tensors: oracle(*tensors, key_valid, pattern, 0.3))
    # with a single visible key the gradients of query and key are zero but for rounding: against the norm of all three
    total = torch.stack([gradient.norm() for gradient in expected_gradients]).norm().clamp(min=1e-30)
    for name, attend in implementations.items():
        output, gradients = run(lambda *tensors: attend(*tensors, key_valid, pattern=pattern, scaling=0.3))  # noqa: B023
        assert relative(output, expected) < TOLERANCE[dtype], name
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert (gradient - expected_gradient).norm() / total < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_implementations_equal_the_oracle(case, dtype):
    compare_with_the_oracle(case, dtype, IMPLEMENTATIONS)


def compiled(attend, backend):
    """`attend` in one graph; a pattern is not what a graph takes, so it is held by a closure, as a model holds it."""

    def call(query, key, value, key_valid, *, pattern, scaling):
        def inner(query, key, value, key_valid):
            return attend(query, key, value, key_valid, pattern=pattern, scaling=scaling)

        return torch.compile(inner, fullgraph=True, backend=backend, dynamic=False)(query, key, value, key_valid)

    return call


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["8x8-whole", "7x13-padded", "33x20-padded", "drawn-7", "drawn-19"])
def test_compiled_implementations_equal_the_oracle(name, fresh_compiler):
    functions = {key: compiled(attend, "aot_eager") for key, attend in IMPLEMENTATIONS.items()}
    compare_with_the_oracle(CASES[name], torch.float64, functions)


@pytest.mark.parametrize("name", ["7x13-padded", "33x20-whole"])
def test_compiled_flex_attention_equals_the_dense_form(name, fresh_compiler):
    pattern = make_pattern(CASES[name])
    tensors = [torch.randn(2, 2, pattern.num_tokens, 16) for _ in range(3)]
    key_valid = torch.rand(2, pattern.num_tokens) < 0.7 if CASES[name]["padded"] else None
    with torch.no_grad():
        found = compiled(flex_block_attention, "aot_eager")(*tensors, key_valid, pattern=pattern, scaling=0.3)
        assert relative(found, dense_attention(*tensors, key_valid, pattern=pattern, scaling=0.3)) < 2e-5


@pytest.mark.slow  # ten minutes
@pytest.mark.parametrize("name", CASES)
def test_all_cases_equal_the_oracle_when_compiled(name, fresh_compiler):
    functions = {key: compiled(attend, "aot_eager") for key, attend in IMPLEMENTATIONS.items()}
    for dtype in TOLERANCE:
        compare_with_the_oracle(CASES[name], dtype, functions)


@pytest.mark.slow  # a minute each for the C++ compiler
@pytest.mark.parametrize("name", ["7x13-padded", "33x20-padded", "drawn-7"])
def test_the_default_compilers_code_equals_the_oracle(name, fresh_compiler):
    functions = {key: compiled(attend, "inductor") for key, attend in IMPLEMENTATIONS.items()}
    compare_with_the_oracle(CASES[name], torch.float32, functions)


@pytest.mark.parametrize("attend", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_a_sample_of_padding_alone_gives_zeros(attend):
    pattern = block_pattern(7, 9, tile_size=(2, 4), num_global_tiles=1)
    tensors = [torch.randn(2, 2, pattern.num_tokens, 4, requires_grad=True) for _ in range(3)]
    key_valid = torch.ones(2, pattern.num_tokens, dtype=torch.bool)
    key_valid[1] = False
    output = attend(*tensors, key_valid, pattern=pattern, scaling=0.5)
    assert (output[1] == 0).all()
    assert output[0].abs().min() > 0
    weight = torch.randn(output.shape)  # also where the output is zero
    for gradient in torch.autograd.grad((output * weight).sum(), tensors):
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()


def test_block_sparse_attention_computes_half_precision_in_fp32():
    pattern = block_pattern(9, 12, tile_size=(2, 4))
    tensors = [torch.randn(1, 2, pattern.num_tokens, 8).bfloat16().requires_grad_() for _ in range(3)]
    wide = [one.detach().float().requires_grad_() for one in tensors]
    found = block_sparse_attention(*tensors, None, pattern=pattern, scaling=0.3)
    expected = block_sparse_attention(*wide, None, pattern=pattern, scaling=0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)
    gradients = torch.autograd.grad(found.float().sum(), tensors)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), wide), strict=True):
        torch.testing.assert_close(gradient, wanted.bfloat16(), rtol=0, atol=0)


def test_block_sparse_attention_keeps_inputs_output_and_a_number_per_query():
    pattern = block_pattern(24, 24, tile_size=(4, 4))
    tensors = [torch.randn(1, 2, pattern.num_tokens, 8, requires_grad=True) for _ in range(3)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        output = block_sparse_attention(*tensors, None, pattern=pattern, scaling=0.3)
    assert {one.data_ptr() for one in saved} > {one.data_ptr() for one in (*tensors, output)}
    assert sum(one.numel() for one in saved) == 4 * output.numel() + 2 * pattern.num_tokens


def test_the_oracle_notices_a_missing_link():
    # the comparison above must be able to fail: without its random tiles the pattern gives other numbers
    full = block_pattern(8, 8, tile_size=(2, 2), num_random_blocks=3)
    less = block_pattern(8, 8, tile_size=(2, 2), num_random_blocks=0)
    tensors = [torch.randn(1, 1, 65, 8, dtype=torch.float64) for _ in range(3)]
    with_links = oracle(*tensors, None, full, 0.3)
    without = block_sparse_attention(*tensors, None, pattern=less, scaling=0.3)
    assert relative(without, with_links) > 1e-3


def test_eager_probabilities_follow_the_pattern():
    pattern = block_pattern(7, 13, tile_size=(2, 2), num_random_blocks=2)
    tensors = [torch.randn(2, 2, pattern.num_tokens, 8) for _ in range(3)]
    _, probabilities = eager_attention(torch.nn.Identity(), *tensors, None, pattern=pattern, scaling=0.3)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 2, pattern.num_tokens))
    assert ((probabilities > 0) == pattern.token_mask()[None]).all()


def test_choice_of_blocks_depends_on_the_pattern_alone():
    large = block_pattern(64, 64)
    small = block_pattern(14, 14, tile_size=(4, 4))
    assert prefers_blocks(large)
    assert not prefers_blocks(small)
    assert not prefers_blocks(block_pattern(64, 64, tile_size=(64, 64)))
    tensors = [torch.randn(1, 1, large.num_tokens, 4, dtype=torch.float64) for _ in range(3)]
    chosen, _ = sdpa_attention(torch.nn.Identity(), *tensors, None, pattern=large, scaling=0.5)
    dense = dense_attention(*tensors, None, pattern=large, scaling=0.5)
    assert relative(chosen.transpose(1, 2), dense) < 1e-10


@pytest.mark.parametrize("attend", [eager_attention, sdpa_attention, flex_attention])
@pytest.mark.parametrize("mask", [torch.ones(1, 17), torch.ones(17, dtype=torch.bool)], ids=["type", "shape"])
def test_a_wrong_mask_is_named(attend, mask):
    tensors = [torch.randn(1, 1, 17, 16) for _ in range(3)]
    with pytest.raises(ValueError, match=r"`attention_mask`: expected bool \(batch, tokens\) \(1, 17\), got torch"):
        attend(torch.nn.Identity(), *tensors, mask, pattern=block_pattern(4, 4, tile_size=(2, 2)), scaling=1.0)


@pytest.mark.parametrize("attend", [eager_attention, sdpa_attention, flex_attention])
def test_a_plan_for_other_heads_is_named(attend):
    pattern = block_pattern(4, 4, tile_size=(2, 2))
    pattern = pattern.with_neighbours(pattern.neighbours.expand(2, -1, -1))
    tensors = [torch.randn(1, 3, 17, 16) for _ in range(3)]
    with pytest.raises(ValueError, match="`pattern`: expected a table for all heads or 3, one for each, got 2"):
        attend(torch.nn.Identity(), *tensors, None, pattern=pattern, scaling=1.0)


def test_a_pattern_may_be_forgotten_before_the_backward_pass():
    tensors = [torch.randn(1, 1, 65, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    alone = torch.arange(16)[None, :, None]

    def loss(attend):
        pattern = block_pattern(8, 8, tile_size=(2, 2)).with_neighbours(alone)
        return attend(*tensors, None, pattern=pattern, scaling=0.3).square().sum()

    total = loss(block_sparse_attention)
    gc.collect()
    for found, expected in zip(
        torch.autograd.grad(total, tensors), torch.autograd.grad(loss(dense_attention), tensors), strict=True
    ):
        assert relative(found, expected) < 1e-10


def test_dropout_is_off_in_evaluation_and_unbiased_in_training():
    pattern = block_pattern(8, 8, tile_size=(2, 2))
    query, key = (torch.randn(1, 1, 65, 4, dtype=torch.float64) for _ in range(2))
    value = torch.ones(1, 1, 65, 4, dtype=torch.float64)
    for attend in (dense_attention, gathered_attention):
        mean = torch.stack(
            [attend(query, key, value, None, pattern=pattern, scaling=0.3, dropout=0.5).mean() for _ in range(200)]
        ).mean()
        assert mean.item() == pytest.approx(1.0, abs=0.05)
        still = attend(query, key, value, None, pattern=pattern, scaling=0.3)
        torch.testing.assert_close(still, value)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "case",
    [
        *list(CASES.values())[::5],
        # whole blocks of 128, and of two tiles
        {
            "grid": (16, 33),
            "arguments": {"tile_size": (16, 8)},
            "batch": 2,
            "heads": 2,
            "plan": "shared",
            "padded": True,
        },
        {"grid": (24, 40), "arguments": {}, "batch": 1, "heads": 2, "plan": "per-head", "padded": False},
    ],
    ids=lambda case: "x".join(map(str, case["grid"])),
)
def test_flex_attention_equals_the_dense_form(case):
    pattern = make_pattern(case)
    tensors = [torch.randn(case["batch"], case["heads"], pattern.num_tokens, 16) for _ in range(3)]
    key_valid = None
    if case["padded"]:
        key_valid = torch.rand(case["batch"], pattern.num_tokens) < 0.7
    with torch.no_grad():
        found = flex_block_attention(*tensors, key_valid, pattern=pattern, scaling=0.3)
        expected = dense_attention(*tensors, key_valid, pattern=pattern, scaling=0.3)
    assert relative(found, expected) < 2e-5


def test_flex_blocks_have_a_legal_size():
    assert flex_block_size(block_pattern(32, 32, tile_size=(16, 8))) == 128
    assert flex_block_size(block_pattern(32, 32, tile_size=(8, 8))) == 64
    assert flex_block_size(block_pattern(32, 32, tile_size=(2, 2))) == 64


def test_flex_attention_refuses_gradients_on_a_cpu():
    pattern = block_pattern(8, 8)
    tensors = [torch.randn(1, 1, pattern.num_tokens, 16, requires_grad=True) for _ in range(3)]
    with pytest.raises(ValueError, match=r"`attn_implementation`: expected 'sdpa' or 'eager' for training on a CPU"):
        flex_block_attention(*tensors, None, pattern=pattern, scaling=0.3)


def test_flex_attention_stays_compiled_for_any_number_of_shapes(fresh_compiler):
    """Torch's own limit is 8; beyond runs the form that materialises all scores, with a warning: an error here."""
    attend = flex_block_attention_module._compiled("eager")
    for count in range(1, 13):
        with torch.no_grad():
            attend(*[torch.randn(1, 1, 64 * count, 16) for _ in range(3)])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_fails_loudly_beyond_its_limit(fresh_compiler, monkeypatch):
    monkeypatch.setattr(flex_block_attention_module, "MAX_SHAPES", 2)
    flex_block_attention_module._compiled.cache_clear()
    attend = flex_block_attention_module._compiled("eager")
    with torch.no_grad():
        for count in (1, 2):
            attend(*[torch.randn(1, 1, 64 * count, 16) for _ in range(3)])
        with pytest.raises(Exception, match="recompile_limit"):
            attend(*[torch.randn(1, 1, 192, 16) for _ in range(3)])
    flex_block_attention_module._compiled.cache_clear()


def test_eager_attention_takes_large_halves():
    # q.k is 1.2 million before scaling, beyond a half's 65,504
    pattern = block_pattern(4, 4, tile_size=(2, 2))
    tensors = [torch.full((1, 1, 17, 64), 135.0, dtype=torch.float16) for _ in range(2)]
    value = torch.randn(1, 1, 17, 64, dtype=torch.float16)
    found = eager(*tensors, value, None, pattern=pattern, scaling=0.01)
    torch.testing.assert_close(found, dense_attention(*tensors, value, None, pattern=pattern, scaling=0.01))


def test_gathered_gradients_are_summed_in_fp32():
    pattern = block_pattern(16, 16, tile_size=(2, 2), window_size=7, num_random_blocks=5)
    drawn = [torch.randn(1, 1, pattern.num_tokens, 32).bfloat16() for _ in range(4)]

    def gradients(function, dtype):
        leaves = [one.to(dtype).requires_grad_() for one in drawn[:3]]
        output = function(*leaves, None, pattern=pattern, scaling=0.2)
        return torch.autograd.grad((output * drawn[3].to(dtype)).sum(), leaves)

    exact = gradients(dense_attention, torch.float64)
    gathered, dense = (gradients(one, torch.bfloat16) for one in (gathered_attention, dense_attention))
    for one, other, expected in zip(gathered[1:], dense[1:], exact[1:], strict=True):
        assert relative(one.double(), expected) < 1.1 * relative(other.double(), expected)
