"""Losses of images and captions against formulas written out, in pieces, and over several processes."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_vicreg.training.engine.two_pass import two_pass_backward

WORKER = Path(__file__).with_name("worker_image_text.py")
specification = importlib.util.spec_from_file_location("worker_image_text", WORKER)
worker = importlib.util.module_from_spec(specification)
specification.loader.exec_module(worker)

LOSSES = pytest.mark.parametrize(("loss", "norm", "weight"), worker.LOSSES, ids=lambda one: str(one))


def embeddings_of(model, batch):
    """Both branches by hand: pooled output, or the mean of the tokens that are no padding; then the expander."""
    texts = batch["second_inputs"]
    states = model.second_encoder(**texts).last_hidden_state
    pooled = [row[: int(mask.sum())].mean(0) for row, mask in zip(states, texts["attention_mask"], strict=True)]
    pixels = batch["pixel_values"]
    views = [pixels] if pixels.ndim == 4 else pixels.unbind(1)
    first, *others = (model.expander(model.encoder(pixel_values=view).pooler_output) for view in views)
    return first, model.second_expander(torch.stack(pooled)), *others


def written_out(kind, z_a, z_b, model, weights=((20.0, 1.0), (15.0, 2.0))):
    """The losses as their papers have them, in loops where that is plainest."""
    count, width = z_a.shape
    if kind == "vicreg":
        invariance = sum((z_a[i] - z_b[i]).square().sum() for i in range(count)) / (count * width)
        total = 25 * invariance
        for z, (mu, nu) in zip((z_a, z_b), weights, strict=True):
            centred = z - z.mean(0)
            covariance = centred.T @ centred / (count - 1)
            off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
            hinge = (1 - (covariance.diagonal() + 1e-4).sqrt()).clamp(min=0).mean()
            total = total + mu * hinge / 2 + nu * off_diagonal / width
        return total
    z_a, z_b = (z / z.norm(dim=1, keepdim=True) for z in (z_a, z_b))
    scores = model.logit_scale.exp() * z_a @ z_b.T
    if kind == "infonce":
        both = [
            -torch.log(torch.exp(s[i, i]) / torch.exp(s[i]).sum()) for s in (scores, scores.T) for i in range(count)
        ]
        return sum(both) / (2 * count)
    scores = scores + model.logit_bias
    return (
        sum(
            torch.log(1 + torch.exp(-scores[i, j] if i == j else scores[i, j]))
            for i in range(count)
            for j in range(count)
        )
        / count
    )


def expected(loss, norm, weight=0):
    model, batch = worker.build_model(loss, norm, weight), worker.pairs(2 if weight else 1)
    image, text, *others = embeddings_of(model, batch)
    value = written_out(loss, image, text, model)
    if weight:  # both views are of the first branch, whose weights they have
        value = value + weight * written_out("vicreg", image, *others, model, ((20.0, 1.0), (20.0, 1.0)))
    value.backward()
    return value.item(), worker.gradient(model)


@LOSSES
def test_loss_and_gradient_are_those_of_the_formula(loss, norm, weight):
    value, gradient = expected(loss, norm, weight)
    model = worker.build_model(loss, norm, weight)
    outputs = model(**worker.pairs(2 if weight else 1))
    assert (outputs.image_pair is not None) == (weight > 0)
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(value, rel=1e-10)
    assert (worker.gradient(model) - gradient).norm() <= 1e-10 * gradient.norm()


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_pieces_of_several_processes_have_the_gradient_of_the_formula(world_size, ranks, tmp_path):
    output = tmp_path / "results.safetensors"
    finished = ranks(world_size, WORKER, world_size, output)
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = load_file(output)
    assert results["world_size"] == world_size
    for loss, norm, weight in worker.LOSSES:
        value, gradient = expected(loss, norm, weight)
        assert results[f"{loss}_{weight}_loss"].item() == pytest.approx(value, rel=1e-10)
        assert (results[f"{loss}_{weight}_gradient"] - gradient).norm() <= 1e-10 * gradient.norm(), loss


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_frozen_text_side_gets_no_gradient_and_its_expander_does(pieces):
    model = worker.build_model("vicreg", "batch")
    model.second_encoder.requires_grad_(False)
    parts = [lambda piece=piece: piece for piece in worker.split(worker.pairs(), pieces)]
    two_pass_backward(model, parts, torch.Tensor.backward)
    assert all(one.grad is None for one in model.second_encoder.parameters())
    _, whole = expected("vicreg", "batch")
    other = worker.build_model("vicreg", "batch")
    other(**worker.pairs()).loss.backward()
    for mine, right in ((model.encoder, other.encoder), (model.second_expander, other.second_expander)):
        found, wanted = worker.gradient(mine), worker.gradient(right)
        assert (found - wanted).norm() <= 1e-10 * whole.norm()
