"""How spread out embeddings and representations are: what says whether an encoder learns or collapses.

All figures are of the global batch, in float32, and taken from tensors that the step has made anyway. They touch no
random state and no gradient: a run measured at every step ends with the weights of a run that is not measured.

Symbols: N images in the global batch, n of them on this process; D dimensions; C the covariance of the N rows; v its
diagonal.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from hf_vicreg.modeling.modeling_vicreg import VicRegOutput

GLOBAL_VIEWS = 2
TINY = 1e-30  # keeps 0 / 0 of a dead batch at 0


class Spread(NamedTuple):
    """How the rows of a batch differ from each other; means over the views.

    Attributes:
        std_min: Smallest standard deviation of a dimension, of any view.
        std_mean: Mean standard deviation over dimensions and views.
        share: Root of the share that differences between images have in the mean square of the rows, 0 to 1; 0 where
            all rows are equal.
        rank: Effective rank, 1 to min(D, N - 1).
        covariance_ratio: Squared off-diagonal covariances over what independent dimensions of the same variances give
            in a batch of N: 1 is as decorrelated as N images can show, N - 1 is a single direction.
    """

    std_min: float
    std_mean: float
    share: float
    rank: float
    covariance_ratio: float


@torch.no_grad()
def measure_health(
    outputs: VicRegOutput, process_group: dist.ProcessGroup | None = None, *, unit_sphere: bool = False
) -> dict[str, float]:
    """Return the health of one step by the names of the log; every process of the group must call.

    Args:
        outputs: Of a training step: `embeddings` `(n, views, D)`, `representations` `(n, views, features)` or a tuple
            of one `(n, features)` for each of two encoders. The two global views, which come first, are measured.
        process_group: Processes that hold the global batch in equal shares.
        unit_sphere: Whether the loss sees the directions of the embeddings alone. Each is then scaled to the length
            that dimensions of unit variance would give it.

    Returns:
        `embedding_std_min`, `embedding_std_mean`, `embedding_rank`, `covariance_ratio`, `covariance_floor` (what
        independent dimensions of unit variance give: (D - 1) / (N - 1)), `encoder_std_min`, `encoder_std_mean`,
        `encoder_spread`, `encoder_rank`; those of a second encoder with `second_` before the name.
    """
    assert outputs.embeddings is not None
    assert outputs.representations is not None
    embeddings = outputs.embeddings[:, :GLOBAL_VIEWS]
    if unit_sphere:
        embeddings = F.normalize(embeddings.float(), dim=-1) * embeddings.shape[-1] ** 0.5
    found = spread(embeddings, process_group)
    num_samples = len(embeddings) * (1 if process_group is None else dist.get_world_size(process_group))
    health = {
        "embedding_std_min": found.std_min,
        "embedding_std_mean": found.std_mean,
        "embedding_rank": found.rank,
        "covariance_ratio": found.covariance_ratio,
        "covariance_floor": (embeddings.shape[-1] - 1) / (num_samples - 1),
    }
    branches = outputs.representations
    for prefix, branch in zip(("", "second_"), branches if isinstance(branches, tuple) else (branches,), strict=False):
        found = spread(branch[:, :GLOBAL_VIEWS] if branch.ndim == 3 else branch[:, None], process_group)
        health |= {
            f"{prefix}encoder_std_min": found.std_min,
            f"{prefix}encoder_std_mean": found.std_mean,
            f"{prefix}encoder_spread": found.share,
            f"{prefix}encoder_rank": found.rank,
        }
    return health


@torch.no_grad()
def spread(rows: torch.Tensor, process_group: dist.ProcessGroup | None = None) -> Spread:
    """Return how the rows of the global batch differ; every process of the group must call.

    The effective rank is the participation ratio of the covariance's eigenvalues, `(sum λ)^2 / sum λ^2 =
    (tr C)^2 / ||C||_F^2`: 1 where all variance lies in one direction, D where it is the same in all. It needs no
    eigenvalues, only the smaller of `Zc^T Zc` (D x D) and `Zc Zc^T` (N x N), whose Frobenius norms are equal. N
    samples of D independent dimensions give about 1 / (1 / D + 1 / (N - 1)).
    Source: Gao and Ganguli 2015 (arXiv 1503.08779). It is the exponential of the Rényi entropy of order 2 of the
    normalised eigenvalues; RankMe (Garrido et al. 2023, arXiv 2210.02885) takes Shannon's, of the singular values,
    which counts weak directions for more.

    Args:
        rows: `(n, views, D)`, this process's share of at least 2 images in all; D is at least 2.
        process_group: Processes that hold the rest, in equal shares.
    """
    rows = rows.detach().float()
    num_samples = len(rows) * (1 if process_group is None else dist.get_world_size(process_group))
    mean = _summed(rows.sum(0), process_group) / num_samples
    centred = rows - mean
    variance = _summed(centred.square().sum(0), process_group) / (num_samples - 1)  # (views, D)
    std = variance.sqrt()
    # in units of each view's own scale: the fourth power of what a collapse leaves would underflow
    scale = std.mean(1, keepdim=True).clamp_min(TINY)
    centred, scaled = centred / scale, (std / scale).square()
    norms = [_squared_norm(view, num_samples, process_group) for view in centred.unbind(1)]
    norm, trace, diagonal = torch.stack(norms), scaled.sum(1), scaled.square().sum(1)
    floor = (trace.square() - diagonal) / (num_samples - 1)
    share = variance.sum(1) / (variance.sum(1) + mean.square().sum(1)).clamp_min(TINY)
    return Spread(
        std.min().item(),
        std.mean().item(),
        share.sqrt().mean().item(),
        (trace.square() / norm.clamp_min(TINY)).mean().item(),
        ((norm - diagonal) / floor.clamp_min(TINY)).mean().item(),
    )


def _squared_norm(centred: torch.Tensor, num_samples: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return `||C||_F^2` of the global batch from this process's centred rows `(n, D)`, by the smaller matrix."""
    if num_samples < centred.shape[1]:
        everyone = centred
        if group is not None:
            everyone = centred.new_empty(num_samples, centred.shape[1])
            dist.all_gather(list(everyone.chunk(dist.get_world_size(group))), centred.contiguous(), group=group)
        squares = _summed((centred @ everyone.T).square().sum(), group)
    else:
        squares = _summed(centred.T @ centred, group).square().sum()
    return squares / (num_samples - 1) ** 2


def _summed(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(values, group=group)
    return values
