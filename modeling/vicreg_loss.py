"""VICReg loss: invariance, variance, covariance; one function of the global batch, however many processes hold it.

Source: Bardes, Ponce, LeCun, "VICReg", ICLR 2022 (arXiv 2105.04906), equations 1 to 6.

Symbols: Z and Z' are the embeddings of two views, N the global batch, n one process's share of it, D the width.
Invariance `s = mean (Z - Z')^2`. Variance `v(Z) = mean_j max(0, gamma - sqrt(Var(Z_j) + eps))`. Covariance
`c(Z) = 1/D sum_{j != k} C_jk^2` with `C = Zc^T Zc / (N - 1)`, Zc being Z less its column means.

The weights are those of a convention: see `vicreg_weights.py`.

With local views Z'' of small crops beside the two global ones, s is the mean over the pairs of a global view and any
other one, and v and c are means over all views times two, so that without local views the loss is the one above.
Source: Bardes, Ponce, LeCun, "VICRegL", NeurIPS 2022 (arXiv 2210.01571), the global criterion of `main_vicregl.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .objective import view_pairs
from .vicreg_statistics import centre, covariance_form, share_sizes, squares, view_statistics
from .vicreg_weights import Convention, Weight, check_weights, convention_factors


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
    local_views: Sequence[torch.Tensor] = (),
    process_group: dist.ProcessGroup | None = None,
    equal_shares: bool = False,
) -> VicRegTerms:
    """Return the VICReg loss of two batches of embeddings, or more where there are local views.

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
        local_views: Embeddings of further, small crops of the same images, each `(batch, dimensions)`.
        process_group: Processes whose batches, of equal size, together make the global batch. Each gets the loss of
            the global batch, and gradients multiplied by the number of processes, so that the mean over processes
            that DistributedDataParallel takes is the gradient of one process with the joined batch. All must call.
        equal_shares: The caller knows that they are of equal size: they are not compared, which costs an exchange and
            makes a GPU's processor wait for it.

    Raises:
        ValueError: Wrong shape or type, fewer than two samples in the global batch, a negative weight, weights for
            each of two views beside local ones, an unknown convention, or batches of different size in the group (on
            every process).
    """
    views = (z_a, z_b, *local_views)
    pairs = check_weights(invariance_weight, variance_weight, covariance_weight, gamma, eps)
    weights = [_view_weights(*one, len(views)) for one in zip(("variance", "covariance"), pairs, strict=True)]
    num_samples = _global_batch(views, process_group, equal_shares)
    factors = convention_factors(convention, z_a.shape[1])
    if num_samples < 2:
        raise ValueError(
            f"`z_a`, `z_b`: expected at least 2 samples for a covariance, got a batch of {num_samples}; "
            "raise the batch size."
        )
    dtype = torch.float32
    for z in views:
        dtype = torch.promote_types(dtype, z.dtype)
    with torch.autocast(z_a.device.type, enabled=False):
        invariance, *of_views = _VicRegTerms.apply(gamma, eps, process_group, *(z.to(dtype) for z in views))
        invariance = factors.invariance * invariance
        loss, sums = invariance_weight * invariance, []
        for factor, view_weights, parts in (
            (factors.variance, weights[0], of_views[: len(views)]),
            (factors.covariance, weights[1], of_views[len(views) :]),
        ):
            parts = [part * (factor * 2 / len(views)) for part in parts]
            for weight, part in zip(view_weights, parts, strict=True):
                loss = loss + weight * part
            sums.append(torch.stack(parts).sum())
    return VicRegTerms(loss, invariance, *sums)


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
        self,
        z_a: torch.Tensor,
        z_b: torch.Tensor,
        local_views: Sequence[torch.Tensor] = (),
        process_group: dist.ProcessGroup | None = None,
    ) -> VicRegTerms:
        """Return the loss of embeddings `(batch, dimensions)` of two views and any local ones."""
        return vicreg_loss(z_a, z_b, local_views=local_views, process_group=process_group, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _view_weights(name: str, pair: tuple[float, float], num_views: int) -> list[float]:
    """A weight for each view; the two of a pair are for two views alone."""
    if num_views > 2 and pair[0] != pair[1]:
        raise ValueError(f"`{name}_weight`: expected one number beside local views, got {pair}.")
    return list(pair) if num_views == 2 else [pair[0]] * num_views


def _global_batch(views: Sequence[torch.Tensor], group: dist.ProcessGroup | None, equal_shares: bool) -> int:
    """Return N; refuse bad or unequal shares on every process, where a later collective would hang or mix them up."""
    problem = _find_problem(views)
    if group is None or equal_shares:
        if problem:
            raise ValueError(problem)
        return len(views[0]) * (1 if group is None else dist.get_world_size(group))
    own = [0, 0, 0] if problem else [len(views[0]), views[0].shape[1], len(views)]
    sizes = share_sizes(own, group, views[0].device)
    if problem:
        raise ValueError(problem)
    if any(size != sizes[0] for size in sizes):
        raise ValueError(
            "`z_a`: expected one (batch, dimensions) and number of views on every process of the group, got "
            f"{sizes}; 0 stands for embeddings that the process itself refuses."
        )
    return sizes[0][0] * len(sizes)


def _find_problem(views: Sequence[torch.Tensor]) -> str | None:
    z_a, z_b, *local_views = views
    if z_a.ndim != 2 or z_a.shape != z_b.shape:
        return (
            "`z_a`, `z_b`: expected two tensors of one shape (batch, dimensions), "
            f"got {tuple(z_a.shape)} and {tuple(z_b.shape)}."
        )
    names = ("z_a", "z_b", *(f"local_views[{index}]" for index in range(len(local_views))))
    for name, z in zip(names, views, strict=True):
        if z.shape != z_a.shape:
            return f"`{name}`: expected the shape of the global views, {tuple(z_a.shape)}, got {tuple(z.shape)}."
        if not z.is_floating_point():
            return f"`{name}`: expected a floating point tensor, got {z.dtype}."
    return None


class _VicRegTerms(torch.autograd.Function):
    """s, then v of every view, then c of every view, with their closed-form gradients."""

    @staticmethod
    def forward(ctx, gamma, eps, group, *views):
        world_size = 1 if group is None else dist.get_world_size(group)
        num_samples, dimensions = len(views[0]) * world_size, views[0].shape[1]
        of_views = [view_statistics(z, num_samples, group) for z in views]

        distances = [share * squares(views[one] - views[other]) for one, other, share in view_pairs(len(views))]
        sums = torch.stack([torch.stack(distances).sum(), *(one.off_diagonal for one in of_views)])
        if group is not None:
            # the moments' terms are whole on every process already
            by_gram = covariance_form(num_samples, dimensions) == "gram"
            dist.all_reduce(sums if by_gram else sums[:1], group=group)
        distance, *off_diagonals = sums.unbind()
        deviations = [(one.variance + eps).sqrt() for one in of_views]
        variances = [(gamma - deviation).relu().mean() for deviation in deviations]

        for_backward = zip(views, of_views, deviations, strict=True)
        ctx.save_for_backward(*(x for z, one, std in for_backward for x in (z, *one.means, one.product, std)))
        ctx.sizes = (num_samples, dimensions, world_size, gamma)
        return distance / (num_samples * dimensions), *variances, *(one / dimensions for one in off_diagonals)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_invariance, *grads):
        saved = ctx.saved_tensors
        views = [saved[start : start + 5] for start in range(0, len(saved), 5)]
        num_samples, dimensions, world_size, gamma = ctx.sizes
        # every process holds the whole loss and DDP averages gradients: times the world size makes the mean a sum
        scale = world_size / (dimensions * (num_samples - 1))
        gradients = []
        grad_variances, grad_covariances = grads[: len(views)], grads[len(views) :]
        for (z, mean, residual, product, deviation), grad_variance, grad_covariance in zip(
            views, grad_variances, grad_covariances, strict=True
        ):
            # the hinge is on the standard deviation: d sqrt(var + eps) / dz = Zc / ((N - 1) deviation)
            push = torch.where(deviation < gamma, -scale * grad_variance / deviation, 0)
            gradient = product * (4 * scale * grad_covariance)
            gradients.append(gradient.addcmul_(centre(z, (mean, residual)), push))
        for one, other, share in view_pairs(len(views)):
            pull = world_size * grad_invariance * 2 * share / (num_samples * dimensions)
            difference = views[one][0] - views[other][0]
            gradients[one].addcmul_(difference, pull)
            gradients[other].addcmul_(difference, -pull)
        return None, None, None, *gradients


__all__ = ["VicRegLoss", "VicRegTerms", "vicreg_loss"]
