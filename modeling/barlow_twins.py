"""Barlow Twins: the correlations between the dimensions of two views are those of the identity.

Source: Zbontar, Jing, Misra, LeCun, Deny, "Barlow Twins", ICML 2021 (arXiv 2103.03230), equations 1 and 2; the
authors' code (facebookresearch/barlowtwins, `main.py`) for the batch norm, whose variance is the biased one, and its
epsilon.
"""

import torch
import torch.distributed as dist

from .global_batch import global_size, global_sum
from .global_batch_norm import standardised
from .objective import Objective, Terms, mean_over_pairs, require
from .vicreg_statistics import full_precision

EPS = 1e-5  # torch's default for a batch norm, as in the authors' code


def cross_correlation_terms(
    z_a: torch.Tensor, z_b: torch.Tensor, process_group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `sum_j (1 - C_jj)^2` and `sum_{j != k} C_jk^2` of two views, C their cross-correlation over all images.

    Args:
        z_a: `(batch, dimensions)`, embeddings of the first view, this process's share.
        z_b: The same of the second view.
        process_group: Processes that hold the batch in equal shares.
    """
    a, b = (standardised(one, EPS, process_group) for one in (z_a, z_b))
    with full_precision():
        correlation = global_sum(a.T @ b, process_group) / global_size(a, process_group)
    diagonal = correlation.diagonal()
    off_diagonal = correlation - torch.diag(diagonal)
    return (1 - diagonal).square().sum(), off_diagonal.square().sum()


class BarlowTwins(Objective):
    """The sum of the two; with local views, over every pair of a global view and another one."""

    name = "barlow_twins"
    defaults = {"redundancy_weight": 0.0051}  # noqa: RUF012  a constant
    sees_shifts = False

    @classmethod
    def check(cls, settings, config):
        require(settings, "redundancy_weight", least=0)

    def forward(self, embeddings, further, process_group):
        invariance, redundancy = mean_over_pairs(
            len(embeddings),
            lambda one, other: cross_correlation_terms(embeddings[one], embeddings[other], process_group),
        )
        loss = invariance + self.settings["redundancy_weight"] * redundancy
        return Terms(loss, {"invariance": invariance, "redundancy": redundancy})


__all__ = ["BarlowTwins", "cross_correlation_terms"]
