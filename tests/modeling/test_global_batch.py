"""Several real processes against one with the joined batch."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_vicreg import vicreg_loss
from hf_vicreg.modeling.global_batch_norm import GlobalBatchNorm1d

WORKER = Path(__file__).with_name("worker_global_batch.py")
specification = importlib.util.spec_from_file_location("worker_global_batch", WORKER)
worker = importlib.util.module_from_spec(specification)
specification.loader.exec_module(worker)

pytestmark = pytest.mark.distributed


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow), 4],
    ids="{}-processes".format,
)
def results(request, made_once, ranks):
    """What the worker measured with that many processes, its world size asserted first."""
    count = request.param

    def measure(output):
        finished = ranks(count, WORKER, count, output)
        assert finished.returncode == 0, finished.stderr[-3000:]

    loaded = load_file(made_once(f"global_batch_{count}", measure))
    assert loaded["world_size"] == request.param
    return loaded


@pytest.mark.parametrize("shape", worker.SHAPES, ids=["gram", "moments"])
def test_loss_is_that_of_the_global_batch(results, shape):
    leaves = [z.requires_grad_() for z in worker.embeddings(*shape, torch.float64)]
    loss = vicreg_loss(*leaves).loss
    gradient = torch.cat(torch.autograd.grad(loss, leaves), dim=1)
    exact = results[f"exact_{shape[0]}_gradient"]
    assert (exact - gradient).norm() <= 1e-10 * gradient.norm()
    assert results[f"exact_{shape[0]}_loss"].item() == pytest.approx(loss.item(), rel=1e-12)
    # the known wrong forms, statistics of one process and gradients of its own share, must fail this comparison
    for name in ("per_process", "own_gradient"):
        wrong = results[f"{name}_{shape[0]}_gradient"]
        right = (wrong - gradient).norm() <= 1e-10 * gradient.norm()
        assert right == (results["world_size"] == 1), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_gradients_through_ddp_are_those_of_the_joined_batch(results, norm, dtype, tolerance):
    model = worker.build_model(norm, dtype)
    outputs = model(pixel_values=worker.images(dtype))
    outputs.loss.backward()
    gradient = worker.flat_gradient(model)
    key = f"{norm}_{str(dtype).removeprefix('torch.')}"
    assert results[f"{key}_loss"].item() == pytest.approx(outputs.loss.item(), rel=tolerance)
    assert (results[f"{key}_gradient"] - gradient).norm() <= tolerance * gradient.norm()
    if norm == "batch":
        running = torch.cat([model.expander.norm[0].running_mean, model.expander.norm[0].running_var])
        torch.testing.assert_close(results[f"{key}_running"], running, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("position", ["rope", "absolute"])
def test_no_weight_walks_at_random(results, position):
    # a weight whose gradient is rounding noise goes its own way for each number of processes
    model = worker.build_model("batch", torch.float32, position)
    expected = worker.walk(model, worker.images(torch.float32), model)
    for name, weight in expected.items():
        difference = (results[f"walk_{position}.{name}"] - weight).norm()
        assert difference <= 1e-3 * weight.norm(), name


@pytest.mark.parametrize("what", ["samples", "views", "shapes", "types", "batch_views", "layer_views"])
def test_unequal_shares_are_refused_everywhere(results, what):
    assert results[f"{what}_refused"] == (results["world_size"] > 1)  # one process has no other


def test_global_batch_norm_alone_is_batch_norm():
    ours, theirs = GlobalBatchNorm1d(5), torch.nn.BatchNorm1d(5)
    for training in (True, False):
        states = torch.randn(6, 5)
        assert torch.equal(ours.train(training)(states), theirs.train(training)(states))
