"""What `sdpa` may take: forms equal in outputs and gradients, each timed; one that is not equal is left out."""

import pytest
import torch

from hf_vicreg import BigBirdViTConfig, BigBirdViTModel
from hf_vicreg.modeling import bigbird_attention
from hf_vicreg.modeling.attention_timing import fastest_forms, time_forms, use_forms

SETTINGS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES = {(36, 52): 2, (20, 20): 3}  # 9 x 13 and 5 x 5 patches


def encoder(**changes):
    torch.manual_seed(0)
    settings = {"image_size": 52, "patch_size": 4, "tile_size": 2, "num_random_blocks": 2} | changes
    return BigBirdViTModel(BigBirdViTConfig(**SETTINGS, **settings)).train()


def gradients(model, pixel_values):
    model.zero_grad()
    output = model(pixel_values).last_hidden_state
    output.square().sum().backward()
    return output.detach(), [one.grad.clone() for one in model.parameters() if one.grad is not None]


@pytest.mark.parametrize("form", ["dense", "gathered", "blocks"])
def test_a_form_that_is_named_is_taken_and_computes_what_eager_does(form, monkeypatch):
    model, taken = encoder().double(), []
    for name in ("dense", "gathered", "block_sparse"):
        attend = getattr(bigbird_attention, f"{name}_attention")
        watched = lambda *inputs, name=name, attend=attend, **more: taken.append(name) or attend(*inputs, **more)  # noqa: E731
        monkeypatch.setattr(bigbird_attention, f"{name}_attention", watched)
    pixel_values = torch.randn(2, 3, 36, 52, dtype=torch.float64)
    use_forms(model, {(9, 13): form})
    found, of_form = gradients(model, pixel_values)
    assert {one.split("_")[0] for one in taken} == {form.removesuffix("s").split("_")[0] if form == "blocks" else form}
    model.set_attn_implementation("eager")
    expected, of_eager = gradients(model, pixel_values)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    for one, other in zip(of_form, of_eager, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_each_form_that_is_legal_is_timed_and_the_fastest_taken_by_grid():
    model = encoder()
    timed = time_forms(model, 36, 52, 2, torch.float32, seconds=0)
    assert timed.keys() == {"dense", "gathered", "blocks"}
    assert all(seconds > 0 for seconds in timed.values())
    assert time_forms(encoder(attention_probs_dropout_prob=0.1), 36, 52, 2, torch.float32, seconds=0).keys() == {
        "dense",
        "gathered",
    }
    state = torch.get_rng_state()
    for one in (model, encoder(attention_probs_dropout_prob=0.1)):  # which draws
        torch.set_rng_state(state)
        forms = fastest_forms(one, SIZES, torch.float32)
        assert forms.keys() == {(9, 13), (5, 5)}
        assert torch.equal(torch.get_rng_state(), state)


def test_a_form_that_fails_or_gives_other_numbers_is_left_out(monkeypatch, caplog):
    model = encoder()
    wrong = bigbird_attention.block_sparse_attention
    monkeypatch.setattr(bigbird_attention, "block_sparse_attention", lambda *one, **more: 2 * wrong(*one, **more))

    def full(*inputs, **more):
        raise torch.OutOfMemoryError("the device is full\nand more")

    monkeypatch.setattr(bigbird_attention, "gathered_attention", full)
    assert time_forms(model, 36, 52, 2, torch.float32, seconds=0).keys() == {"dense"}


def test_where_a_form_is_not_legal_the_rule_holds():
    model = encoder(attention_probs_dropout_prob=0.5)
    pixel_values = torch.randn(1, 3, 36, 52)
    outputs = []
    for forms in ({}, {(9, 13): "blocks"}, {(9, 13): "flex"}):
        use_forms(model, forms)
        torch.manual_seed(1)
        outputs.append(model(pixel_values).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
