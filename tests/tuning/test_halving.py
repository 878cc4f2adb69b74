"""What a tuning draws, how many go on and for how long; and the figures that need no labels."""

import math

import pytest
import torch

from hf_vicreg.training.monitor.label_free import BETTER, label_free_figures, lidar, rankme
from hf_vicreg.tuning.halving import best_of, counts_of, drawn, steps_for


def test_half_of_the_trials_go_on_until_two_are_compared():
    assert [counts_of(count) for count in (8, 7, 3, 2)] == [[8, 4, 2], [7, 4, 2], [3, 2], [2]]
    scores = {0: 1.0, 1: math.nan, 2: 3.0, 3: 3.0, 4: 2.0}
    assert best_of(scores, 3) == [2, 3, 4]
    assert best_of(dict.fromkeys(range(3), math.nan), 2) == []


def test_draws_fill_each_range_evenly_and_begin_with_what_there_is():
    space = {"learning_rate": (1e-4, 1e-2), "views.crop_min_ratio": (0.2, 0.6)}
    first = {"learning_rate": 1e-3, "views.crop_min_ratio": 0.3}
    trials = drawn(space, first, 9, seed=3)
    assert trials == drawn(space, first, 9, seed=3)
    assert trials != drawn(space, first, 9, seed=4)
    assert trials[0] == first
    rates = sorted(math.log10(one["learning_rate"]) for one in trials[1:])
    crops = sorted(one["views.crop_min_ratio"] for one in trials[1:])
    for at in range(8):  # one in each eighth of the range: of logarithms where it is wide
        assert -4 + at / 4 - 0.01 <= rates[at] <= -4 + (at + 1) / 4 + 0.01
        assert 0.2 + at / 20 - 0.001 <= crops[at] <= 0.2 + (at + 1) / 20 + 0.001


def test_each_round_has_its_share_of_the_time():
    given = {"step_seconds": 0.5, "other_seconds": 10.0}
    assert steps_for(2400, [8, 4, 2], **given) == 180  # (2400 / 3 / 8 - 10) / 0.5
    assert steps_for(1600, [4, 2], **given) == 380
    assert steps_for(60, [4, 2], **given) == 0


def test_ranks_without_labels_are_those_of_a_plain_loop():
    views = torch.randn(30, 4, 6, dtype=torch.float64) + 3 * torch.randn(30, 1, 6, dtype=torch.float64)
    rows = views[:, 0]
    values = torch.linalg.eigvalsh(rows.T @ rows).sqrt()
    shares = values / values.sum() + 1e-7
    assert rankme(rows) == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-9)
    scaled = views / views.square().mean().sqrt()
    within, between = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    for image in scaled:
        away = image.mean(0) - scaled.mean((0, 1))
        between += torch.outer(away, away) / 30
        for view in image:
            within += torch.outer(view - image.mean(0), view - image.mean(0)) / (30 * 4)
    values = torch.linalg.eigvals(torch.linalg.inv(within + 1e-4 * torch.eye(6, dtype=torch.float64)) @ between).real
    shares = values / values.sum() + 1e-7
    assert lidar(views) == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-9)
    assert lidar(7 * views) == pytest.approx(lidar(views), rel=1e-9)


def test_figures_tell_spread_from_collapse():
    good = torch.randn(64, 1, 16) + 0.1 * torch.randn(64, 4, 16)
    narrow = torch.randn(64, 1, 1) * torch.randn(16) + 0.01 * torch.randn(64, 4, 16)
    found, collapsed = label_free_figures(good), label_free_figures(narrow)
    assert set(found) == set(BETTER)
    for name in ("effective_rank", "rankme", "lidar", "uniformity", "alignment_uniformity"):
        assert BETTER[name] * found[name] > BETTER[name] * collapsed[name], name
    unit = torch.nn.functional.normalize(good.double(), dim=2)
    pairs = [(unit[i, 0] - unit[j, 0]).square().sum() for i in range(64) for j in range(i)]
    assert found["uniformity"] == pytest.approx((-2 * torch.stack(pairs)).exp().mean().log().item())
    assert found["alignment"] == pytest.approx((unit[:, 0] - unit[:, 1]).square().sum(1).mean().item())
