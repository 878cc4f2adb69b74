"""Cosines, neighbours and votes against whole numbers in plain Python, which no instruction set rounds.

These run under three instruction sets and two numbers of threads (`make test-rounding`).
"""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_vicreg.training.evaluation import exact_cosine
from hf_vicreg.training.evaluation.exact_cosine import exact_cosines, on_grid
from hf_vicreg.training.evaluation.neighbours import (
    knn_accuracy,
    knn_predictions,
    mean_average_precision,
    nearest_in_bank,
)

pytestmark = pytest.mark.rounding


def unit(row):
    """Multiples of 2^-25, as whole numbers, of one vector."""
    bits = min(24, (62 - (len(row) - 1).bit_length()) // 2)
    largest = max(map(abs, row))
    power_of_two = 2.0 ** math.frexp(largest)[1] if largest else 1.0
    whole = [round(value / power_of_two * 2.0**bits) for value in row]
    length = max(1.0, math.sqrt(sum(value * value for value in whole)))
    return [round(value / length * 2.0**25) for value in whole]


def cosines_by_hand(bank, queries):
    """Multiples of 2^-50, as whole numbers, `queries` lists of `bank` cosines."""
    bank, queries = ([unit(row) for row in side.double().tolist()] for side in (bank, queries))
    return [[sum(a * b for a, b in zip(query, one, strict=True)) for one in bank] for query in queries]


def alike(count, width, seed=0):
    """Features of which every third is that of an image before, and which all point in nearly the same direction."""
    generator = torch.Generator().manual_seed(seed)
    features = 3 + 1e-3 * torch.randn(count, width, generator=generator)
    features[2::3] = features[: len(features[2::3])]
    return features


@pytest.mark.parametrize("width", [1, 7, 384, 3072])
def test_no_bit_is_rounded(width):
    bank, queries = alike(31, width), alike(9, width, seed=1)
    found = torch.cat([part for _, part in exact_cosines(bank, queries)])
    assert [[value * 2.0**50 for value in row] for row in found.tolist()] == cosines_by_hand(bank, queries)
    bound = math.sqrt(width) * 2.0**-24
    assert torch.allclose(found, F.normalize(queries.double()) @ F.normalize(bank.double()).T, rtol=0, atol=bound)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_any_scale_is_as_exact(scale):
    features = torch.randn(5, 12).clamp(-1, 1) * scale
    assert (on_grid(features) * 2.0**25).tolist() == [unit(row) for row in features.double().tolist()]
    assert torch.allclose(on_grid(features).norm(dim=1), torch.ones(5).double(), rtol=0, atol=1e-6)


def test_what_is_no_number_is_near_to_nothing():
    features = torch.tensor([[math.nan, math.nan], [math.inf, -math.inf], [0.0, 0.0], [3.0, 4.0]])
    assert on_grid(features)[:3].tolist() == [[0.0, 0.0]] * 3
    labels = torch.tensor([0, 1, 1, 0])
    assert knn_accuracy(features, labels, features, labels, neighbours=1) == 0.5


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("elements", [1, 200, 2**24])
@pytest.mark.parametrize("count", [1, 4, 20, 62])
def test_neighbours_are_the_same_however_the_work_is_cut(count, elements, threads, monkeypatch):
    monkeypatch.setattr(exact_cosine, "ELEMENTS", elements)
    torch.set_num_threads(threads)
    bank, queries = alike(62, 40), alike(23, 40, seed=1)
    parts = list(nearest_in_bank(bank, queries, count))
    assert len(parts) == {1: 23, 200: 8, 2**24: 1}[elements]
    similarity, nearest = (torch.cat(part) for part in zip(*parts, strict=True))
    for row, (found, order) in enumerate(zip(similarity, nearest.tolist(), strict=True)):
        (cosines,) = cosines_by_hand(bank, queries[row : row + 1])
        assert order == sorted(range(62), key=lambda place: (-cosines[place], place))[:count]
        assert [value * 2.0**50 for value in found.tolist()] == [cosines[place] for place in order]


def test_of_equal_neighbours_the_first_count_and_of_equal_votes_the_lower_class():
    bank, labels = torch.ones(50, 6), torch.tensor([2, 1, 1, 2] + 46 * [0])
    found = knn_predictions(bank, labels, 7 * torch.ones(3, 6), neighbours=[1, 2, 3, 4])
    assert {k: value.tolist() for k, value in found.items()} == {1: [2] * 3, 2: [1] * 3, 3: [1] * 3, 4: [1] * 3}


def test_votes_are_weighed_by_similarity():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    # exp(0) against 2 exp(-0.4 / temperature), which are equal at 0.577
    for temperature, expected in ((0.5, 0), (0.7, 1)):
        found = knn_predictions(
            bank, torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0.0]]), neighbours=[3], temperature=temperature
        )
        assert found[3].tolist() == [expected]


@pytest.mark.parametrize("elements", [1, 150, 2**24])
def test_retrieval_is_the_same_however_the_work_is_cut(elements, monkeypatch):
    monkeypatch.setattr(exact_cosine, "ELEMENTS", elements)
    gallery, queries = alike(50, 24), alike(21, 24, seed=1)
    labels, query_labels = torch.arange(50) % 5, torch.arange(21) % 6
    found, counted = mean_average_precision(gallery, labels, queries, query_labels)
    precisions = []
    for cosines, label in zip(cosines_by_hand(gallery, queries), query_labels.tolist(), strict=True):
        order = sorted(range(50), key=lambda place: (-cosines[place], place))
        ranks = [rank for rank, place in enumerate(order, 1) if labels[place] == label]
        if ranks:
            precisions.append(sum(at / rank for at, rank in enumerate(ranks, 1)) / len(ranks))
    assert counted == len(precisions) == 18
    assert found == pytest.approx(sum(precisions) / 18, rel=1e-12)
