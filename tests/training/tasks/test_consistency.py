"""The consistency loss against its formulas."""

import math

import pytest
import torch

from hf_vicreg.training.tasks.classification.consistency import (
    annealed_cross_entropy,
    annealing_threshold,
    consistency_loss,
)


def test_thresholds_rise_from_chance_to_one():
    for schedule in ("log", "linear", "exp"):
        rising = [annealing_threshold(schedule, step, 50, 10) for step in range(50)]
        assert rising == sorted(rising)
        assert 0.1 < rising[0] < 0.3
        assert rising[-1] > 0.99
    at_half = {one: annealing_threshold(one, 49, 100, 10) for one in ("none", "log", "linear", "exp")}
    expected = {"none": 1.0, "log": 1 - math.exp(-2.5), "linear": 0.5, "exp": math.exp(-2.5)}
    assert at_half == {one: pytest.approx(share * 0.9 + 0.1) for one, share in expected.items()}


def test_images_predicted_well_enough_do_not_count():
    logits = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 2.0]], requires_grad=True)
    labels = torch.tensor([0, 1, 0])
    right = logits.softmax(1)[torch.arange(3), labels]  # 0.95, 0.5, 0.12
    total, counted = annealed_cross_entropy(logits, labels, 0.8)
    assert counted == 2
    assert total.item() == pytest.approx(-(right[1].log() + right[2].log()).item())
    total.backward()
    assert logits.grad[0].abs().sum() == 0
    assert logits.grad[1:].abs().sum() > 0
    assert annealed_cross_entropy(logits, labels, 1.0)[1] == 3


def test_divergence_from_sharpened_confident_predictions():
    torch.manual_seed(0)
    strong, weak = torch.randn(6, 4, requires_grad=True), (3 * torch.randn(6, 4)).requires_grad_()
    loss, share = consistency_loss(strong, weak, confidence_threshold=0.7, sharpening_temperature=0.4)
    with torch.no_grad():
        expected = []
        for row in range(6):
            probability = weak[row].exp() / weak[row].exp().sum()
            target = (weak[row] / 0.4).exp() / (weak[row] / 0.4).exp().sum()
            predicted = strong[row].exp() / strong[row].exp().sum()
            divergence = (target * (target / predicted).log()).nansum()
            expected.append(divergence if probability.max() >= 0.7 else torch.tensor(0.0))
    counted = sum(one > 0 for one in expected)
    assert 0 < counted < 6
    assert share.item() == pytest.approx(counted / 6)
    assert loss.item() == pytest.approx(sum(expected).item() / 6, rel=1e-5)
    loss.backward()
    assert weak.grad is None
    assert strong.grad.abs().sum() > 0
