"""What features are worth, told without labels, from several views of each of some images.

Symbols: n images, q views of each, D features; z the features of a view, u = z / |z|.
"""

import torch
import torch.nn.functional as F

from hf_vicreg.training.monitor.health import TINY, spread

EPS, RIDGE = 1e-7, 1e-4  # RankMe's and LiDAR's own
# whether more of a figure is better
BETTER = {"effective_rank": 1, "rankme": 1, "lidar": 1, "alignment": -1, "uniformity": -1, "alignment_uniformity": -1}


@torch.no_grad()
def label_free_figures(views: torch.Tensor) -> dict[str, float]:
    """Return the figures of `BETTER`.

    Args:
        views: `(n, q, D)` with at least two of each: features of views of images.

    Returns:
        `effective_rank`: the participation ratio of the covariance of the first views, as the log of a run has it.
        `rankme`: `rankme` of the first views. `lidar`: `lidar` of all. `alignment`: `mean |u - u'|^2` of the first two
        views of each image; low also where all images are alike, so it says nothing alone. `uniformity`:
        `log mean exp(-2 |u_i - u_j|^2)` over the first views of each two images, and `alignment_uniformity` their sum.
        Source of these: Wang and Isola, ICML 2020 (arXiv 2005.10242), section 4.
    """
    views = views.double()
    first, second = (F.normalize(view, dim=1) for view in (views[:, 0], views[:, 1]))
    alignment = (first - second).square().sum(1).mean()
    uniformity = (-2 * torch.pdist(first).square()).exp().mean().log()
    return {
        "effective_rank": spread(views[:, :1]).rank,
        "rankme": rankme(views[:, 0]),
        "lidar": lidar(views),
        "alignment": alignment.item(),
        "uniformity": uniformity.item(),
        "alignment_uniformity": (alignment + uniformity).item(),
    }


def rankme(rows: torch.Tensor) -> float:
    """Return `exp(-sum_k p_k log p_k)`, `p_k = s_k / sum s + eps` of the singular values s of rows `(n, D)`.

    Source: Garrido et al., ICML 2023 (arXiv 2210.02885), equation 1, on the encoder's features: not centred.
    """
    values = torch.linalg.svdvals(rows)
    return _perplexity(values / values.sum().clamp_min(TINY) + EPS)


def lidar(views: torch.Tensor) -> float:
    """Return the effective rank of `S_w^(-1/2) S_b S_w^(-1/2)`: differences between images over those between views.

    Source: Thilak et al., ICLR 2024 (arXiv 2312.04000), equations 1 to 5: S_b the covariance of the images' means, S_w
    that of views around them plus 1e-4 on its diagonal, p its eigenvalues over their sum plus 1e-7. On the encoder's
    features, scaled by their mean square, which the 1e-4 is in units of; the paper's are an expander's.

    Args:
        views: `(n, q, D)`.
    """
    views = views / views.square().mean().sqrt().clamp_min(TINY)
    means = views.mean(1)
    between = means - means.mean(0)
    within = (views - means[:, None]).flatten(0, 1)
    identity = torch.eye(views.shape[2], dtype=views.dtype, device=views.device)
    values, vectors = torch.linalg.eigh(within.T @ within / len(within) + RIDGE * identity)
    whitened = between @ vectors / values.sqrt()  # of any root of the inverse the eigenvalues are the same
    eigenvalues = torch.linalg.svdvals(whitened).square()
    return _perplexity(eigenvalues / eigenvalues.sum().clamp_min(TINY) + EPS)


def _perplexity(shares: torch.Tensor) -> float:
    return (-(shares * shares.log()).sum()).exp().item()


__all__ = ["BETTER", "label_free_figures", "lidar", "rankme"]
