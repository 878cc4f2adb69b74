"""torch.compile and torch.export of every class, cold, against eager execution."""

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
        (BigBirdViTModel, "absolute", False, "eager"),
        (BigBirdViTForImageClassification, "absolute", False, "sdpa"),
        (BigBirdViTBackbone, "rope", False, "sdpa"),
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
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
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
