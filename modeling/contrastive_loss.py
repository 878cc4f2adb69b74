"""Losses of pairs that tell each pair from all others: InfoNCE as CLIP has it, and SigLIP's sigmoid loss.

Both are functions of the global batch, as VICReg's is: every process sees the embeddings of all and computes the whole
loss, so that their gradients are equal and average to those of one process with the whole batch.

Symbols: A and B are N embeddings of unit length each, row i of A belonging to row i of B; t is the logarithm of the
scale; S = exp(t) A B^T + b.
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .global_batch import global_samples
from .vicreg_statistics import share_sizes

PairLoss = Literal["vicreg", "infonce", "siglip"]
MAX_SCALE = 100.0
# of the first step: exp(t), and b
FIRST_SCALE = {"infonce": 1 / 0.07, "siglip": 10.0}
FIRST_BIAS = -10.0


def contrastive_loss(
    z_a: torch.Tensor,
    z_b: torch.Tensor,
    log_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    kind: PairLoss = "infonce",
    process_group: dist.ProcessGroup | None = None,
    equal_shares: bool = False,
) -> torch.Tensor:
    """Return the scalar loss of a batch of pairs, at least float32.

    `infonce` is the mean of the cross-entropies of the rows of S and of its columns, the pairs being the classes.
    Source: Radford et al. 2021, CLIP (arXiv 2103.00020), figure 3, with its cap of 100 on the scale. `siglip` is
    `-1/N sum_ij log sigmoid(y_ij S_ij)`, y being 1 for pairs and -1 for others. Source: Zhai et al. 2023, SigLIP
    (arXiv 2303.15343), equation 1.

    Args:
        z_a: `(n, dimensions)` embeddings, of any length, of this process's share.
        z_b: The same of their partners.
        log_scale: Scalar t.
        bias: Scalar b, of `siglip`.
        kind: `infonce` or `siglip`.
        process_group: Processes that together hold the batch; each must call.
        equal_shares: The caller knows that their shares are of equal size; then they are not compared.

    Raises:
        ValueError: Shapes that do not agree, another kind, or shares of several sizes.
    """
    if kind not in FIRST_SCALE or z_a.ndim != 2 or z_a.shape != z_b.shape:
        raise ValueError(
            f"`z_a`, `z_b`: expected two (batch, dimensions) alike and a kind of {list(FIRST_SCALE)}, got "
            f"{tuple(z_a.shape)}, {tuple(z_b.shape)} and {kind!r}."
        )
    with torch.autocast(z_a.device.type, enabled=False):
        dtype = torch.promote_types(z_a.dtype, torch.float32)
        both = [F.normalize(one.to(dtype), dim=1) for one in (z_a, z_b)]
        if process_group is not None:
            sizes = [] if equal_shares else share_sizes([len(z_a)], process_group, z_a.device)
            if any(size != sizes[0] for size in sizes):
                raise ValueError(f"`z_a`: expected as many samples on every process, got {sizes}.")
            both = [global_samples(one, process_group) for one in both]
        logits = log_scale.to(dtype).exp().clamp(max=MAX_SCALE) * both[0] @ both[1].T
        if kind == "siglip":
            assert bias is not None
            signs = 2 * torch.eye(len(logits), dtype=dtype, device=logits.device) - 1
            return -F.logsigmoid(signs * (logits + bias.to(dtype))).sum() / len(logits)
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


__all__ = ["PairLoss", "contrastive_loss"]
