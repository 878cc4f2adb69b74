"""VICReg loss: invariance, variance, covariance; one function of the global batch, however many processes hold it.

Source: Bardes, Ponce, LeCun, "VICReg", ICLR 2022 (arXiv 2105.04906), equations 1 to 6.

Symbols: Z and Z' are the embeddings of two views, N the global batch, n one process's share of it, D the width.
Invariance `s = mean (Z - Z')^2`. Variance `v(Z) = mean_j max(0, gamma - sqrt(Var(Z_j) + eps))`. Covariance
`c(Z) = 1/D sum_{j != k} C_jk^2` with `C = Zc^T Zc / (N - 1)`, Zc being Z less its column means.

The weights are those of a convention: see `vicreg_weights.py`.

For N < D the covariance never forms the D x D matrix C: with the Gram matrix `G = Zc Zc^T` (N x N),
`sum_{j != k} C_jk^2 = ||G||_F^2 / (N - 1)^2 - sum_j Var_j^2` (Garrido et al. 2022, arXiv 2206.02574, the duality of
contrastive and non-contrastive losses), and its gradient is `4 / (D (N - 1)) (G Zc / (N - 1) - Zc diag(Var))`. The
difference cancels in float32 where a few dimensions hold nearly all the variance: its error is about 1e-7 of
`sum_j Var_j^2`.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .vicreg_weights import Convention, Weight, check_weights, convention_factors

BLOCK = 512  # rows of a symmetric product computed at a time: 1.9 times as fast at 2,048 rows as the whole


class VicRegTerms(NamedTuple):
    """The loss and its three unweighted parts, scalar tensors with gradient, at least float32."""

    loss: torch.Tensor
    invariance: torch.Tensor
    variance: torch.Tensor
    covariance: torch.Tensor


def vicreg_loss(
    z_a: torch.Tensor,
    z_b: torch.Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: Weight = 25.0,
    covariance_weight: Weight = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    convention: Convention = "official",
    process_group: dist.ProcessGroup | None = None,
) -> VicRegTerms:
    """Return the VICReg loss of two batches of embeddings.

    Computed in float32 (float64 for float64 inputs) whatever the autocast. A non-finite value is returned, not raised.

    Args:
        z_a: `(batch, dimensions)` floating point, embeddings of the first view.
        z_b: `(batch, dimensions)`, embeddings of the second view.
        invariance_weight: Lambda.
        variance_weight: Mu, or one for each view.
        covariance_weight: Nu, or one for each view.
        gamma: Target of each dimension's standard deviation.
        eps: Added to the variance under the root.
        convention: Whose parts the weights are of; `convert_weights` translates.
        process_group: Processes whose batches, of equal size, together make the global batch. Each gets the loss of
            the global batch, and gradients multiplied by the number of processes, so that the mean over processes
            that DistributedDataParallel takes is the gradient of one process with the joined batch. All must call.

    Raises:
        ValueError: Wrong shape or type, fewer than two samples in the global batch, a negative weight, an unknown
            convention, or batches of different size in the group (on every process).
    """
    if z_a.ndim != 2 or z_a.shape != z_b.shape:
        raise ValueError(
            "`z_a`, `z_b`: expected two tensors of one shape (batch, dimensions), "
            f"got {tuple(z_a.shape)} and {tuple(z_b.shape)}."
        )
    for name, z in (("z_a", z_a), ("z_b", z_b)):
        if not z.is_floating_point():
            raise ValueError(f"`{name}`: expected a floating point tensor, got {z.dtype}.")
    variance_weights, covariance_weights = check_weights(
        invariance_weight, variance_weight, covariance_weight, gamma, eps
    )
    factors = convention_factors(convention, z_a.shape[1])
    num_samples = _global_batch(z_a, process_group)
    if num_samples < 2:
        raise ValueError(
            f"`z_a`, `z_b`: expected at least 2 samples for a covariance, got a batch of {num_samples}; "
            "raise the batch size."
        )
    dtype = torch.promote_types(torch.promote_types(z_a.dtype, z_b.dtype), torch.float32)
    with torch.autocast(z_a.device.type, enabled=False):
        terms = _VicRegTerms.apply(z_a.to(dtype), z_b.to(dtype), gamma, eps, process_group)
        invariance, *rest = (term * factor for term, factor in zip(terms, factors.of_terms(), strict=True))
        variances, covariances = rest[:2], rest[2:]
        loss = invariance_weight * invariance
        for weights, parts in ((variance_weights, variances), (covariance_weights, covariances)):
            loss = loss + weights[0] * parts[0] + weights[1] * parts[1]
    return VicRegTerms(loss, invariance, variances[0] + variances[1], covariances[0] + covariances[1])


class VicRegLoss(nn.Module):
    """`vicreg_loss` with its settings stored; the arguments are the same."""

    def __init__(
        self,
        *,
        invariance_weight: float = 25.0,
        variance_weight: Weight = 25.0,
        covariance_weight: Weight = 1.0,
        gamma: float = 1.0,
        eps: float = 1e-4,
        convention: Convention = "official",
    ):
        super().__init__()
        check_weights(invariance_weight, variance_weight, covariance_weight, gamma, eps)
        convention_factors(convention, 1)
        self.settings: dict[str, Any] = {
            "invariance_weight": invariance_weight,
            "variance_weight": variance_weight,
            "covariance_weight": covariance_weight,
            "gamma": gamma,
            "eps": eps,
            "convention": convention,
        }

    def forward(
        self, z_a: torch.Tensor, z_b: torch.Tensor, process_group: dist.ProcessGroup | None = None
    ) -> VicRegTerms:
        """Return the loss of embeddings `(batch, dimensions)` of two views."""
        return vicreg_loss(z_a, z_b, process_group=process_group, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def covariance_form(num_samples: int, dimensions: int) -> Literal["gram", "moments"]:
    """Return how the covariance of a global batch is computed: by whichever matrix, N x N or D x D, is smaller."""
    return "gram" if num_samples < dimensions else "moments"


def _global_batch(z: torch.Tensor, group: dist.ProcessGroup | None) -> int:
    """Return N; refuse unequal shares on every process, where a later collective would hang or mix them up."""
    if group is None:
        return len(z)
    world_size = dist.get_world_size(group)
    share = torch.tensor([len(z), z.shape[1]], device=z.device)
    shares = share.new_empty(world_size, 2)
    dist.all_gather(list(shares.unbind()), share, group=group)
    sizes = shares.tolist()
    if any(size != sizes[0] for size in sizes):
        raise ValueError(f"`z_a`: expected one (batch, dimensions) on every process of the group, got {sizes}.")
    return sizes[0][0] * world_size


class _Statistics(NamedTuple):
    centred: torch.Tensor  # (n, D)
    variance: torch.Tensor  # (D,), unbiased
    off_diagonal: torch.Tensor  # scalar, sum_{j != k} C_jk^2; by the Gram matrix, this process's share of it
    product: torch.Tensor  # (n, D), Zc offdiag(C)


def _gram_statistics(z: torch.Tensor, num_samples: int, group: dist.ProcessGroup | None) -> _Statistics:
    """N < D: this process's rows of the Gram matrix, n x N. Traffic: Z once, nothing in the backward pass."""
    everyone = z
    if group is not None:
        everyone = z.new_empty(num_samples, z.shape[1])
        dist.all_gather(list(everyone.chunk(dist.get_world_size(group))), z.contiguous(), group=group)
    mean = everyone.mean(0)
    all_centred = everyone - mean
    # twice: where the spread is small beside the mean, the mean's rounding error would outweigh the gradient
    residual = all_centred.mean(0)
    all_centred -= residual
    variance = _squares(all_centred, 0) / (num_samples - 1)
    if group is None:
        centred, gram_rows = all_centred, _times_own_transpose(all_centred)
    else:
        centred = (z - mean).sub_(residual)
        gram_rows = centred @ all_centred.T
    gram_rows /= num_samples - 1
    share = _squares(gram_rows) - len(z) / num_samples * _squares(variance)
    product = torch.mm(gram_rows, all_centred).addcmul_(centred, variance, value=-1)
    return _Statistics(centred, variance, share, product)


def _moment_statistics(z: torch.Tensor, num_samples: int, group: dist.ProcessGroup | None) -> _Statistics:
    """N >= D: the D x D covariance, summed over processes. Traffic: D^2 + 2 D, nothing in the backward pass."""
    centred = z
    for _ in range(2):  # as in `_gram_statistics`
        total = centred.sum(0)
        if group is not None:
            dist.all_reduce(total, group=group)
        centred = centred - total / num_samples
    covariance = _times_own_transpose(centred.T)
    if group is not None:
        dist.all_reduce(covariance, group=group)
    covariance /= num_samples - 1
    variance = covariance.diagonal().clone()
    covariance.fill_diagonal_(0)
    return _Statistics(centred, variance, _squares(covariance), centred @ covariance)


def _squares(values: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Sum of squares, without a tensor of them."""
    return torch.linalg.vector_norm(values, dim=dim).square()


def _times_own_transpose(rows: torch.Tensor) -> torch.Tensor:
    """`rows @ rows.T` in blocks of rows, each half of the symmetric result computed once."""
    if len(rows) <= BLOCK:
        return rows @ rows.T
    result = rows.new_empty(len(rows), len(rows))
    for start in range(0, len(rows), BLOCK):
        end = start + BLOCK
        result[start:end, :end] = rows[start:end] @ rows[:end].T
        result[:start, start:end] = result[start:end, :start].T
    return result


class _VicRegTerms(torch.autograd.Function):
    """s, v(Z), v(Z'), c(Z) and c(Z') with their closed-form gradients."""

    @staticmethod
    def forward(ctx, z_a, z_b, gamma, eps, group):
        world_size = 1 if group is None else dist.get_world_size(group)
        num_samples, dimensions = len(z_a) * world_size, z_a.shape[1]
        by_gram = covariance_form(num_samples, dimensions) == "gram"
        statistics = _gram_statistics if by_gram else _moment_statistics
        a, b = statistics(z_a, num_samples, group), statistics(z_b, num_samples, group)

        difference = z_a - z_b
        sums = torch.stack([_squares(difference), a.off_diagonal, b.off_diagonal])
        if group is not None:
            # the moments' terms are whole on every process already
            dist.all_reduce(sums if by_gram else sums[:1], group=group)
        invariance, *covariances = sums.unbind()
        deviations = [(one.variance + eps).sqrt() for one in (a, b)]
        variances = [(gamma - deviation).relu().mean() for deviation in deviations]

        ctx.save_for_backward(a.centred, b.centred, difference, *deviations, a.product, b.product)
        ctx.sizes = (num_samples, dimensions, world_size, gamma)
        return invariance / (num_samples * dimensions), *variances, *(one / dimensions for one in covariances)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_invariance, grad_variance_a, grad_variance_b, grad_covariance_a, grad_covariance_b):
        centred_a, centred_b, difference, deviation_a, deviation_b, product_a, product_b = ctx.saved_tensors
        num_samples, dimensions, world_size, gamma = ctx.sizes
        gradients = []
        # every process holds the whole loss and DDP averages gradients: times the world size makes the mean a sum
        pull = world_size * grad_invariance * 2 / (num_samples * dimensions)
        scale = world_size / (dimensions * (num_samples - 1))
        for sign, centred, deviation, product, grad_variance, grad_covariance in (
            (1, centred_a, deviation_a, product_a, grad_variance_a, grad_covariance_a),
            (-1, centred_b, deviation_b, product_b, grad_variance_b, grad_covariance_b),
        ):
            # the hinge is on the standard deviation: d sqrt(var + eps) / dz = Zc / ((N - 1) deviation)
            push = torch.where(deviation < gamma, -scale * grad_variance / deviation, 0)
            gradient = product * (4 * scale * grad_covariance)
            gradients.append(gradient.addcmul_(centred, push).addcmul_(difference, sign * pull))
        return *gradients, None, None, None


__all__ = ["VicRegLoss", "VicRegTerms", "covariance_form", "vicreg_loss"]
