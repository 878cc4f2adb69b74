"""SimCLR: of all images of the batch, a view's nearest one is the other view of its own.

Source: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations",
ICML 2020 (arXiv 2002.05709), equation 1 and algorithm 1: NT-Xent.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .global_batch import global_samples, global_size, global_sum
from .objective import Objective, Terms, mean_over_pairs, require
from .vicreg_statistics import full_precision


def nt_xent(
    z_a: torch.Tensor, z_b: torch.Tensor, temperature: float, process_group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two parts of NT-Xent over the global batch of N images, alignment and uniformity; it is their sum.

    With unit vectors u of the 2 N views, s(i, j) = u_i u_j / temperature, j(i) the other view of i's image and
    1 / temperature taken from both parts, which keeps the first from being negative:
    `alignment = mean_i (1 / temperature - s(i, j(i)))`,
    `uniformity = mean_i (log sum_{k != i} exp s(i, k)) - 1 / temperature`.

    Args:
        z_a: `(batch, dimensions)`, embeddings of the first view, this process's share.
        z_b: The same of the second view.
        temperature: Above 0.
        process_group: Processes that hold the batch in equal shares.
    """
    num_samples, rank = global_size(z_a, process_group), 0 if process_group is None else dist.get_rank(process_group)
    a, b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    everyone = torch.cat([global_samples(one, process_group) for one in (a, b)])
    with full_precision():
        scores = torch.cat([a, b]) @ everyone.T / temperature
    own = torch.arange(len(a), device=a.device) + rank * len(a)
    oneself = torch.cat([own, own + num_samples])[:, None]
    totals = scores.scatter(1, oneself, -torch.inf).logsumexp(1) - 1 / temperature
    agreement = 1 / temperature - (a * b).sum(1) / temperature
    sums = global_sum(torch.stack([agreement.sum() * 2, totals.sum()]), process_group)
    alignment, uniformity = (sums / (2 * num_samples)).unbind()
    return alignment, uniformity


class SimCLR(Objective):
    """NT-Xent; with local views, of every pair of a global view and another one."""

    name = "simclr"
    defaults = {"temperature": 0.5}  # noqa: RUF012  a constant

    @classmethod
    def check(cls, settings, config):
        require(settings, "temperature", above=0)

    def forward(self, embeddings, further, process_group):
        temperature = self.settings["temperature"]
        alignment, uniformity = mean_over_pairs(
            len(embeddings),
            lambda one, other: nt_xent(embeddings[one], embeddings[other], temperature, process_group),
        )
        return Terms(alignment + uniformity, {"alignment": alignment, "uniformity": uniformity})


__all__ = ["SimCLR", "nt_xent"]
