"""The loss against the authors' formula and those of ports, each written out, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_vicreg import vicreg_loss
from hf_vicreg.modeling.vicreg_loss import VicRegLoss
from hf_vicreg.modeling.vicreg_statistics import covariance_form, full_precision
from hf_vicreg.modeling.vicreg_weights import convert_weights

SHAPES = [(8, 32), (33, 16), (64, 64), (256, 2048), (2, 3), (5, 1)]


def official(z_a, z_b, *, gamma=1.0, eps=1e-4):
    """Bardes et al. 2022 as in facebookresearch/vicreg: MSE, halved hinge, off-diagonal squares over D."""
    num_samples, dimensions = z_a.shape
    invariance = F.mse_loss(z_a, z_b)
    centred = [z - z.mean(0) for z in (z_a, z_b)]
    variance = sum(F.relu(gamma - (z.var(0) + eps).sqrt()).mean() for z in centred) / 2
    covariance = 0
    for z in centred:
        matrix = z.T @ z / (num_samples - 1)
        covariance = covariance + (matrix - matrix.diagonal().diag()).square().sum() / dimensions
    return invariance, variance, covariance


def off_diagonal_squares(z):
    matrix = torch.cov(z.T)
    return sum(matrix[i, j] ** 2 for i in range(len(matrix)) for j in range(len(matrix)) if i != j) / len(matrix)


def hinge(z, eps):
    return torch.stack([F.relu(1 - (column.var() + eps).sqrt()) for column in z.T]).mean()


# The parts as each of them has it, one by one (see `vicreg_weights.py` for the sources).
CONVENTIONS = {
    "official": lambda a, b, eps: (
        (a - b).square().mean(),
        hinge(a, eps) / 2 + hinge(b, eps) / 2,
        off_diagonal_squares(a) + off_diagonal_squares(b),
    ),
    "paper": lambda a, b, eps: (
        (a - b).square().sum(1).mean(),
        hinge(a, eps) + hinge(b, eps),
        off_diagonal_squares(a) + off_diagonal_squares(b),
    ),
    "solo-learn": lambda a, b, eps: (
        F.mse_loss(a, b),
        hinge(a, eps) + hinge(b, eps),
        off_diagonal_squares(a) + off_diagonal_squares(b),
    ),
    "vicregl": lambda a, b, eps: (
        F.mse_loss(a, b),
        hinge(a, eps) / 2 + hinge(b, eps) / 2,
        off_diagonal_squares(a) / 2 + off_diagonal_squares(b) / 2,
    ),
}


def correlated(num_samples, dimensions):
    """Two views with different means, correlated dimensions and some of the hinges open."""
    base = torch.randn(num_samples, dimensions, dtype=torch.float64) @ torch.randn(
        dimensions, dimensions, dtype=torch.float64
    )
    base = base / dimensions**0.5 + torch.randn(dimensions, dtype=torch.float64)
    return [(base + 0.3 * torch.randn_like(base)).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=["gram", "moments"])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_equal_their_own_formulas(convention, shape):
    leaves = correlated(*shape)
    found = vicreg_loss(*leaves, invariance_weight=3, variance_weight=5, covariance_weight=7, convention=convention)
    parts = CONVENTIONS[convention](*leaves, 1e-4)
    for one, other in zip(found[1:], parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    wanted = 3 * parts[0] + 5 * parts[1] + 7 * parts[2]
    torch.testing.assert_close(found.loss, wanted, rtol=1e-10, atol=0)
    gradients, expected = (torch.cat(torch.autograd.grad(one, leaves)) for one in (found.loss, wanted))
    assert (gradients - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("target", CONVENTIONS)
@pytest.mark.parametrize("source", CONVENTIONS)
def test_converted_weights_are_the_same_objective(source, target):
    leaves = correlated(6, 9)
    weights = convert_weights(25, 15, 2, source=source, target=target, dimensions=9)
    names = ("invariance_weight", "variance_weight", "covariance_weight")
    given = vicreg_loss(*leaves, **dict(zip(names, (25, 15, 2), strict=True)), convention=source).loss
    found = vicreg_loss(*leaves, **dict(zip(names, weights, strict=True)), convention=target).loss
    torch.testing.assert_close(found, given, rtol=1e-12, atol=0)
    if (source, target) == ("official", "paper"):
        assert weights == (25 / 9, 7.5, 2)  # the paper sums over dimensions and views


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=["gram", "moments"])
def test_each_view_may_have_its_own_weights(shape):
    leaves = correlated(*shape)
    found = vicreg_loss(*leaves, variance_weight=(5.0, 2.0), covariance_weight=(0.0, 3.0))
    (a, b), eps = leaves, 1e-4
    wanted = 25 * F.mse_loss(a, b) + 5 * hinge(a, eps) / 2 + 2 * hinge(b, eps) / 2 + 3 * off_diagonal_squares(b)
    torch.testing.assert_close(found.loss, wanted, rtol=1e-10, atol=0)
    gradients, expected = (torch.cat(torch.autograd.grad(one, leaves)) for one in (found.loss, wanted))
    assert (gradients - expected).norm() <= 1e-10 * expected.norm()
    torch.testing.assert_close(found.covariance, off_diagonal_squares(a) + off_diagonal_squares(b))


@pytest.mark.parametrize("num_local", [1, 2, 5])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=["gram", "moments"])
def test_local_views_equal_vicregls_global_criterion(shape, num_local):
    views = [torch.randn(shape, dtype=torch.float64) + torch.randn(shape[1], dtype=torch.float64)]
    views += [views[0] + 0.5 * torch.randn(shape, dtype=torch.float64) for _ in range(1 + num_local)]
    views = [view.requires_grad_() for view in views]
    weights = {"invariance_weight": 3, "variance_weight": 5, "covariance_weight": 7}
    found = vicreg_loss(*views[:2], local_views=views[2:], convention="vicregl", **weights)
    # every pair of a global view and another, then every view, as that code counts them
    pairs = [(one, other) for one in range(2) for other in range(len(views)) if other != one]
    parts = (
        sum(F.mse_loss(views[one], views[other]) for one, other in pairs) / len(pairs),
        sum(hinge(view, 1e-4) for view in views) / len(views),
        sum(off_diagonal_squares(view) for view in views) / len(views),
    )
    for one, other in zip(found[1:], parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
    wanted = 3 * parts[0] + 5 * parts[1] + 7 * parts[2]
    gradients, expected = (torch.cat(torch.autograd.grad(one, views)) for one in (found.loss, wanted))
    assert (gradients - expected).norm() <= 1e-10 * expected.norm()
    # the other conventions weigh the same parts as they do with two views
    for convention in CONVENTIONS:
        converted = convert_weights(3, 5, 7, source="vicregl", target=convention, dimensions=shape[1])
        again = vicreg_loss(
            *views[:2],
            local_views=views[2:],
            convention=convention,
            **dict(zip(weights, converted, strict=True)),
        )
        torch.testing.assert_close(again.loss, found.loss, rtol=1e-12, atol=0)


def test_module_is_the_function():
    leaves = correlated(6, 9)
    module = VicRegLoss(variance_weight=(5.0, 2.0), convention="solo-learn", gamma=0.8)
    expected = vicreg_loss(*leaves, variance_weight=(5.0, 2.0), convention="solo-learn", gamma=0.8)
    assert torch.equal(module(*leaves).loss, expected.loss)
    assert "convention='solo-learn'" in repr(module)
    with pytest.raises(ValueError, match="`convention`: expected one of official, paper"):
        VicRegLoss(convention="mine")


@pytest.mark.parametrize("shape", [(8, 96), (96, 8)], ids=["gram", "moments"])
def test_nothing_of_the_larger_size_is_kept(shape):
    leaves, saved = [torch.randn(shape, requires_grad=True) for _ in range(2)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one.numel()) or one, lambda one: one):
        vicreg_loss(*leaves)
    assert max(saved) == 8 * 96  # no 96 x 96


def test_the_smaller_matrix_is_chosen():
    assert covariance_form(95, 96) == "gram"
    assert covariance_form(96, 96) == "moments"


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0], ids=["collapsing", "unit", "wide"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("num_samples", "dimensions"), SHAPES, ids=lambda value: str(value))
def test_equals_the_official_formula(num_samples, dimensions, dtype, scale):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    # correlated dimensions with different means, and views that are alike, as in training
    base = torch.randn(num_samples, dimensions, dtype=torch.float64) @ torch.randn(
        dimensions, dimensions, dtype=torch.float64
    )
    base = scale * base / dimensions**0.5 + torch.randn(dimensions, dtype=torch.float64)
    leaves = [(base + 0.3 * scale * torch.randn_like(base)).to(dtype).requires_grad_() for _ in range(2)]
    parts = vicreg_loss(*leaves, covariance_weight=0.7)
    reference = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = official(*reference)
    for name, one in zip(("invariance", "variance", "covariance"), expected, strict=True):
        found = getattr(parts, name).double()
        assert (found - one).abs() <= tolerance * max(one.abs().item(), 1e-3), name
    total = 25 * expected[0] + 25 * expected[1] + 0.7 * expected[2]
    assert parts.loss.double().item() == pytest.approx(total.item(), rel=tolerance)
    found = torch.cat(torch.autograd.grad(parts.loss, leaves)).double()
    wanted = torch.cat(torch.autograd.grad(total, reference))
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("shape", [(2048, 1024), (600, 2048)], ids=["moments", "gram"])
def test_long_sums_keep_their_digits(shape):
    # a million squares added one after another in float32 are 1e-3 off
    leaves = [torch.randn(shape).requires_grad_() for _ in range(2)]
    found = vicreg_loss(*leaves)
    reference = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = official(*reference)
    for one, other in zip(found[1:], expected, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=2e-6)
    wanted = torch.cat(torch.autograd.grad(25 * expected[0] + 25 * expected[1] + expected[2], reference))
    gradient = torch.cat(torch.autograd.grad(found.loss, leaves)).double()
    assert (gradient - wanted).norm() <= 2e-6 * wanted.norm()


@pytest.mark.parametrize(("num_samples", "dimensions"), [(64, 512), (512, 64)], ids=["gram", "moments"])
def test_gradient_survives_a_collapse_far_from_zero(num_samples, dimensions):
    # where the spread is small beside the mean, centring once leaves the mean's rounding error in the gradient
    leaves = [(10 + 1e-3 * torch.randn(num_samples, dimensions)).requires_grad_() for _ in range(2)]
    reference = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = torch.cat(torch.autograd.grad(vicreg_loss(*leaves).loss, leaves)).double()
    invariance, variance, covariance = official(*reference)
    wanted = torch.cat(torch.autograd.grad(25 * invariance + 25 * variance + covariance, reference))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("part", ["invariance", "variance", "covariance"])
def test_each_part_has_its_own_gradient(part):
    for shape in ((6, 20), (20, 6)):
        leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        assert torch.autograd.gradcheck(lambda *z: getattr(vicreg_loss(*z, gamma=1.5), part), leaves)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", [(64, 96), (96, 64)], ids=["gram", "moments"])
def test_loss_is_float32_under_autocast(shape, half):
    # a standard deviation of 50: the squares of 96 samples overflow float16 long before they are divided by N - 1
    z_a, z_b = (50 * torch.randn(shape) for _ in range(2))
    expected = vicreg_loss(z_a, z_b)
    with torch.autocast("cpu", dtype=half):
        found = vicreg_loss(z_a, z_b)
    assert found.loss.dtype == torch.float32
    assert torch.equal(found.loss, expected.loss)
    leaves = [z.to(half).requires_grad_() for z in (z_a, z_b)]
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", dtype=half):
        halves = vicreg_loss(*leaves)
    same = vicreg_loss(*wide)
    assert torch.equal(halves.loss, same.loss)
    assert halves.loss.isfinite()
    gradients = zip(torch.autograd.grad(halves.loss, leaves), torch.autograd.grad(same.loss, wide), strict=True)
    for one, other in gradients:
        assert torch.equal(one, other.to(half))


def test_gradient_under_autocast_equals_the_one_without():
    leaf = torch.randn(16, 40, requires_grad=True)
    other = torch.randn(16, 40)
    (expected,) = torch.autograd.grad(vicreg_loss(leaf, other).loss, leaf)
    for half in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=half):
            (found,) = torch.autograd.grad(vicreg_loss(leaf, other).loss, leaf)
        assert torch.equal(found, expected)


def test_non_finite_values_are_returned():
    z = torch.randn(4, 8)
    z[1, 2] = float("nan")
    assert vicreg_loss(z, torch.randn(4, 8)).loss.isnan()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(1, 4), torch.zeros(1, 4)), {}, "at least 2 samples for a covariance, got a batch of 1"),
        ((torch.zeros(4, 4), torch.zeros(4, 5)), {}, r"one shape .* got \(4, 4\) and \(4, 5\)"),
        ((torch.zeros(4), torch.zeros(4)), {}, "expected two tensors"),
        ((torch.zeros(4, 4, dtype=torch.int64),) * 2, {}, "floating point tensor, got torch.int64"),
        ((torch.zeros(4, 4),) * 2, {"variance_weight": -1.0}, "`variance_weight`: expected a number of at least 0"),
        ((torch.zeros(4, 4),) * 2, {"covariance_weight": (1.0, -1.0)}, "`covariance_weight`: .* got -1"),
        ((torch.zeros(4, 4),) * 2, {"covariance_weight": (1.0, 1.0, 1.0)}, "one for each of 2 views, got"),
        ((torch.zeros(4, 4),) * 2, {"invariance_weight": float("nan")}, "`invariance_weight`: .* got nan"),
        (
            (torch.zeros(4, 4),) * 2,
            {"local_views": [torch.zeros(4, 4), torch.zeros(3, 4)]},
            r"`local_views\[1\]`: expected the shape of the global views, \(4, 4\), got \(3, 4\)",
        ),
        (
            (torch.zeros(4, 4),) * 2,
            {"local_views": [torch.zeros(4, 4)], "variance_weight": (1.0, 2.0)},
            "`variance_weight`: expected one number beside local views",
        ),
        ((torch.zeros(4, 4),) * 2, {"convention": "mine"}, "`convention`: expected one of .* got 'mine'"),
    ],
    ids=[
        "one-sample",
        "shapes",
        "not-a-matrix",
        "integers",
        "negative-weight",
        "negative-of-two",
        "three-weights",
        "nan",
        "local-shape",
        "local-weights",
        "convention",
    ],
)
def test_bad_inputs_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        vicreg_loss(*arguments, **options)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (600, 700)], ids=["gram", "moments", "gram-in-blocks"])
def test_products_are_computed_in_full_precision(shape):
    """Whatever the process allows for the rest: TF32 would lose four percent."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
                found.append(torch.get_float32_matmul_precision())
            return function(*arguments, **keywords or {})

    found: list[str] = []
    views = [torch.randn(*shape, requires_grad=True) for _ in range(2)]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with Recorder():
            vicreg_loss(*views).loss.backward()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(found) >= 4
    assert set(found) == {"highest"}


def test_the_newer_switch_for_tf32_is_taken_for_the_products_and_put_back():
    """transformers' `tf32=True` sets it, and the older switch then raises when it is read."""
    matmul = torch.backends.cuda.matmul
    views, before = [torch.randn(6, 9, requires_grad=True) for _ in range(2)], matmul.fp32_precision
    expected = vicreg_loss(*views).loss.item()
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="legacy"):
            torch.get_float32_matmul_precision()
        with full_precision():
            assert matmul.fp32_precision == "ieee"
        assert vicreg_loss(*views).loss.item() == expected
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
