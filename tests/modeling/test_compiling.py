"""torch.compile and torch.export of every class, cold, against eager execution."""

import subprocess
import sys

import pytest
import torch

from hf_vicreg import BigBirdViTBackbone, BigBirdViTConfig, BigBirdViTForImageClassification, BigBirdViTModel
from hf_vicreg.modeling import bigbird_attention

SIZES = [(64, 64), (56, 104)]
CLASSES = (BigBirdViTModel, BigBirdViTForImageClassification, BigBirdViTBackbone)


def make_model(model_class, seed, **changes):
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 64,
        "patch_size": 8,
        "tile_size": 2,
        "num_random_blocks": 1,
        "num_register_tokens": 2,
        "num_labels": 5,
        "attention_seed": seed,  # patterns that nothing has asked for yet
    }
    return model_class(BigBirdViTConfig(**settings | changes))


def call(forward, model, pixel_values):
    """Return the main output and the parameters' gradients."""
    model.zero_grad()
    if isinstance(model, BigBirdViTForImageClassification):
        outputs = forward(pixel_values, labels=torch.tensor([0, 3]))
        found, objective = outputs.logits, outputs.loss
    else:
        outputs = forward(pixel_values)
        found = outputs.feature_maps[0] if isinstance(model, BigBirdViTBackbone) else outputs.last_hidden_state
        objective = found.square().sum()
    objective.backward()
    return found.detach(), [one.grad.clone() for one in model.parameters() if one.grad is not None]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare(model, backend, inference):
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for round_number in range(2):
        for size in SIZES:
            pixel_values = torch.randn(2, 3, *size)
            with torch.compiler.set_stance("fail_on_recompile" if round_number else "default"):
                found, gradients = call(compiled, model, pixel_values)
            expected, wanted = call(model, model, pixel_values)
            assert (found - expected).norm() <= 1e-5 * expected.norm()
            total = torch.stack([one.norm() for one in wanted]).norm()
            assert len(gradients) == len(wanted)
            assert all((one - other).norm() <= 1e-5 * total for one, other in zip(gradients, wanted, strict=True))
    with torch.no_grad():  # inference has graphs of its own
        for size in SIZES if inference else ():
            pixel_values = torch.randn(2, 3, *size)
            found, expected = compiled(pixel_values)[0], model(pixel_values)[0]
            if isinstance(model, BigBirdViTBackbone):
                found, expected = found[0], expected[0]
            assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("model_class", "position", "blocks", "implementation"),
    [
        (BigBirdViTModel, "rope", True, "sdpa"),
        pytest.param(BigBirdViTModel, "absolute", False, "eager", marks=pytest.mark.slow),
        pytest.param(BigBirdViTForImageClassification, "absolute", False, "sdpa", marks=pytest.mark.slow),
        pytest.param(BigBirdViTBackbone, "rope", False, "sdpa", marks=pytest.mark.slow),
    ],
    ids=["encoder-blocks", "encoder-eager-absolute", "classifier-dense-absolute", "backbone-dense"],
)
def test_compiled_equals_eager_and_compiles_once_a_size(
    model_class, position, blocks, implementation, fresh_compiler, monkeypatch
):
    if blocks:
        monkeypatch.setattr(bigbird_attention, "PAIR_COST", 0)
        monkeypatch.setattr(bigbird_attention, "TILE_COST", 0)
    seed = 3000 + CLASSES.index(model_class) * 2 + (implementation == "eager")
    model = make_model(model_class, seed, position_embedding_type=position)
    model.set_attn_implementation(implementation)
    compare(model, "aot_eager", inference=blocks)


def test_several_labels_an_image_compile_once(fresh_compiler):
    model = make_model(BigBirdViTForImageClassification, 3090)
    compiled, pixel_values, labels = torch.compile(model, fullgraph=True, backend="aot_eager"), None, torch.rand(2, 5)
    for stance in ("default", "fail_on_recompile"):
        pixel_values = torch.randn(2, 3, 64, 64)
        with torch.compiler.set_stance(stance):
            found = compiled(pixel_values, labels=labels).loss
    torch.testing.assert_close(found, model(pixel_values, labels=labels).loss)


@pytest.mark.slow  # a minute each for the C++ compiler
@pytest.mark.parametrize("blocks", [False, True], ids=["dense", "blocks"])
@pytest.mark.parametrize("position", ["rope", "absolute"])
@pytest.mark.parametrize("model_class", CLASSES, ids=lambda one: one.__name__)
def test_default_compiler(model_class, position, blocks, fresh_compiler, monkeypatch):
    if blocks:
        monkeypatch.setattr(bigbird_attention, "PAIR_COST", 0)
        monkeypatch.setattr(bigbird_attention, "TILE_COST", 0)
    seed = 4000 + CLASSES.index(model_class) * 4 + 2 * blocks + (position == "rope")
    compare(make_model(model_class, seed, position_embedding_type=position), "inductor", inference=True)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its new name is not in 5.17
def test_gradient_checkpointing_compiles(fresh_compiler):
    model = make_model(BigBirdViTForImageClassification, 3100).train()
    expected, wanted = call(model, model, pixel_values := torch.randn(2, 3, 56, 104))
    model.gradient_checkpointing_enable()
    for forward in (model, torch.compile(model, backend="aot_eager")):
        found, gradients = call(forward, model, pixel_values)
        torch.testing.assert_close(found, expected)
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # transformers' recorder
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["non-strict", "strict"])
@pytest.mark.parametrize("position", ["rope", "absolute"])
@pytest.mark.parametrize("model_class", CLASSES, ids=lambda one: one.__name__)
def test_exports(model_class, position, strict, fresh_compiler):
    seed = 3200 + CLASSES.index(model_class) * 2 + (position == "rope")
    model = make_model(model_class, seed, position_embedding_type=position).eval()
    pixel_values = torch.randn(2, 3, 56, 104)
    exported = torch.export.export(model, (pixel_values,), strict=strict).module()
    found, expected = exported(pixel_values), model(pixel_values)
    one, other = (of.feature_maps[0] if "feature_maps" in of else of[0] for of in (found, expected))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


PATHS = {
    "gathered": {"attention_probs_dropout_prob": 0.1},
    "gathered-global-tiles": {"attention_probs_dropout_prob": 0.1, "num_global_tiles": 2},
    "gathered-raster": {"attention_probs_dropout_prob": 0.1, "attention_layout": "raster", "block_size": 7},
    "blocks-global-tiles": {"num_global_tiles": 2},
}


@pytest.mark.parametrize(
    ("name", "padded"),
    [
        pytest.param(name, name != "gathered", marks=[pytest.mark.slow] * name.startswith("gathered-"), id=name)
        for name in PATHS
    ],
)
def test_every_sparse_path_compiles_cold_with_ragged_tiles(name, padded, fresh_compiler, monkeypatch):
    """The form on GPUs, which a CPU takes with dropout; numbers with dropout differ, so it is nearly 0 for them."""
    monkeypatch.setattr(bigbird_attention, "PAIR_COST", 0)
    monkeypatch.setattr(bigbird_attention, "TILE_COST", 0)
    seed, changes = 5000 + list(PATHS).index(name), PATHS[name]
    if "attention_probs_dropout_prob" in changes:
        changes = changes | {"attention_probs_dropout_prob": 1e-9}
    model = make_model(BigBirdViTModel, seed, **changes).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    pixel_values, mask = torch.randn(2, 3, 56, 104), None
    if padded:
        mask = torch.ones(2, 56, 104)
        mask[0, 40:], mask[1, :, 60:] = 0, 0
    found = compiled(pixel_values, mask).pooler_output
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(found.square().sum(), parameters)
    expected = model(pixel_values, mask).pooler_output
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    total = torch.stack([one.norm() for one in wanted]).norm()
    assert all((one - other).norm() <= 1e-5 * total for one, other in zip(gradients, wanted, strict=True))


def test_compiled_patterns_are_never_stale_and_equal_ones_compile_once(fresh_compiler):
    model = make_model(BigBirdViTModel, 3300).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    pixel_values, own = torch.randn(2, 3, 64, 64), model.attention_patterns(64, 64)

    def check(shift, **keywords):
        """Every tile sees itself and the one `shift` further."""
        table = torch.stack([torch.arange(16), (torch.arange(16) + shift) % 16], dim=-1)[None]
        given = [one.with_neighbours(table) for one in own]  # new ones every time
        with torch.no_grad():
            found = compiled(pixel_values, attention_patterns=given).last_hidden_state
            expected = model(pixel_values, attention_patterns=given).last_hidden_state
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        return expected

    first = check(1)
    assert not torch.allclose(first, check(2))
    with torch.compiler.set_stance("fail_on_recompile"):
        for shift in (1, 2):
            check(shift)
    with torch.no_grad():
        before = compiled(pixel_values).last_hidden_state
        model.config.attention_seed += 1  # in place, as `set_attn_implementation` changes its field
        found, expected = compiled(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, before)


PROGRAMS = {
    "dense-registers": ({"num_register_tokens": 2, "tile_size": 2}, (56, 104)),
    "dense-absolute": ({"position_embedding_type": "absolute", "num_global_tiles": 1}, (64, 64)),
    "blocks": ({"tile_size": 8, "patch_size": 4, "image_size": 160, "num_hidden_layers": 1}, (160, 160)),
    "blocks-ragged": ({"tile_size": 8, "patch_size": 4, "num_hidden_layers": 1, "num_global_tiles": 1}, (148, 164)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    # the default run has test_export.py, which goes on from here
    [("dense-registers", "blocks-ragged"), ("dense-absolute", "blocks")],
    ids="-and-".join,
)
def test_exported_programs_run_where_this_package_is_not(names, tmp_path):
    """Patterns are tensors of the program, operators are torch's own, and a batch has any size."""
    for name in names:
        changes, size = PROGRAMS[name]
        model = make_model(BigBirdViTModel, 3400, return_dict=False, **changes).eval()  # a tuple needs torch alone
        assert bigbird_attention.prefers_blocks(model.attention_pattern(*size)) == name.startswith("blocks")
        assert not model.attention_pattern(*size).is_full
        program = torch.export.export(
            model, (torch.randn(2, 3, *size),), dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}}
        )
        operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert "bigbird_vit" not in "".join(operators)
        torch.export.save(program, tmp_path / f"{name}.pt2")
        with torch.no_grad():
            images = [torch.randn(batch, 3, *size) for batch in (1, 2, 7)]
            torch.save([(one, model(one)[0]) for one in images], tmp_path / f"{name}.pt")
    code = """
import sys
sys.modules["hf_vicreg"] = sys.modules["transformers"] = None  # importing them fails
import torch
for name in sys.argv[1:]:
    program = torch.export.load(f"{name}.pt2").module()
    for images, expected in torch.load(f"{name}.pt"):
        torch.testing.assert_close(program(images)[0], expected, atol=1e-4, rtol=1e-4)
"""
    command = [sys.executable, "-c", code, *names]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
