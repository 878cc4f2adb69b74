"""Spread, rank and noise floor against plain linear algebra in float64, from one process and from two."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_vicreg.modeling.modeling_vicreg import VicRegOutput
from hf_vicreg.training.monitor.health import measure_health, spread

WORKER = Path(__file__).with_name("worker_health.py")
specification = importlib.util.spec_from_file_location("worker_health", WORKER)
worker = importlib.util.module_from_spec(specification)
specification.loader.exec_module(worker)


def oracle(rows):
    """The same figures from eigenvalues and whole matrices."""
    stds, ranks, ratios, shares = [], [], [], []
    for view in rows.double().unbind(1):
        covariance = torch.cov(view.T)
        eigenvalues = torch.linalg.eigvalsh(covariance).clamp_min(0)
        ranks.append(eigenvalues.sum() ** 2 / eigenvalues.square().sum())
        variance = covariance.diagonal()
        off_diagonal = covariance.square().sum() - variance.square().sum()
        independent = (torch.outer(variance, variance) - torch.diag(variance.square())).sum() / (len(view) - 1)
        ratios.append(off_diagonal / independent)
        stds.append(variance.sqrt())
        shares.append((variance.sum() / (variance.sum() + view.mean(0).square().sum())).sqrt())
    stds = torch.stack(stds)
    means = [torch.stack(one).mean() for one in (shares, ranks, ratios)]
    return [one.item() for one in (stds.min(), stds.mean(), *means)]


@pytest.mark.parametrize("shape", worker.SHAPES, ids=lambda shape: "N{}-V{}-D{}".format(*shape))
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e6], ids=["unit", "collapsed", "exploded"])
def test_figures_are_those_of_the_covariance(shape, scale):
    rows = worker.rows(shape) * scale
    assert list(spread(rows)) == pytest.approx(oracle(rows), rel=1e-4)


def test_known_spreads():
    independent = spread(torch.randn(400, 2, 300))
    assert independent.covariance_ratio == pytest.approx(1, abs=0.05)
    assert independent.rank == pytest.approx(1 / (1 / 300 + 1 / 399), rel=0.05)
    assert independent.std_mean == pytest.approx(1, abs=0.02)
    line = spread(torch.randn(50, 1, 1) * torch.ones(80))
    assert line.rank == pytest.approx(1, rel=1e-4)
    assert line.covariance_ratio == pytest.approx(49, rel=1e-4)
    for one in (torch.ones(6, 2, 5), torch.zeros(6, 2, 5)):
        equal = spread(one)
        assert equal.std_mean == equal.share == equal.rank == equal.covariance_ratio == 0


def test_broken_rows_give_no_figure_and_no_error():
    rows = torch.randn(8, 2, 4)
    rows[3, 1, 2] = math.nan
    assert all(math.isnan(value) for value in spread(rows)[1:])


def test_both_encoders_are_named():
    embeddings = torch.randn(8, 2, 5, requires_grad=True)
    outputs = VicRegOutput(embeddings=embeddings, representations=(torch.randn(8, 3), 0.01 * torch.randn(8, 7) + 1))
    found = measure_health(outputs)
    assert found["covariance_floor"] == pytest.approx(4 / 7)
    assert found["encoder_spread"] > 0.5 > 0.05 > found["second_encoder_spread"]
    assert found.keys() == {
        "embedding_std_min",
        "embedding_std_mean",
        "embedding_rank",
        "covariance_ratio",
        "covariance_floor",
        *(f"{one}encoder_{key}" for one in ("", "second_") for key in ("std_min", "std_mean", "spread", "rank")),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_measure_the_global_batch(processes, tmp_path, ranks):
    output = tmp_path / "results.safetensors"
    finished = ranks(processes, WORKER, processes, output)
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = load_file(output)
    assert results["world_size"] == processes
    for shape in worker.SHAPES:
        expected = torch.tensor(list(spread(worker.rows(shape))), dtype=torch.float64)
        for rank in range(processes):  # every process sees the same
            torch.testing.assert_close(results[worker.name(shape)][rank], expected, rtol=1e-5, atol=0)
