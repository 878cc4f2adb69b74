"""Consistency loss: unlabelled images shall be classified alike however they are augmented.

Source: Xie et al. 2019, Unsupervised Data Augmentation (arXiv 1904.12848), sections 2 and 3. The unlabelled part is
the KL divergence from a sharpened prediction on a weakly augmented image, which gets no gradient, to the prediction on
a strongly augmented one; images whose weak prediction is not confident do not count. Training-signal annealing keeps
few labels from being over-fitted: a labelled image counts only while the probability of its class is below a threshold
that rises from chance to 1.
"""

import math

import torch
import torch.nn.functional as F


def annealing_threshold(schedule: str, step: int, num_steps: int, num_classes: int) -> float:
    """Return the probability of the right class above which a labelled image does not count.

    Args:
        schedule: `none` (always 1), `log`, `linear` or `exp`: how the threshold rises from 1 / `num_classes` to 1.
        step: From 0 to `num_steps` - 1.
        num_steps: Length of the training.
        num_classes: K of the source.
    """
    progress = (step + 1) / num_steps
    share = {
        "none": 1.0,
        "log": 1 - math.exp(-5 * progress),
        "linear": progress,
        "exp": math.exp(5 * (progress - 1)),
    }[schedule]
    return share * (1 - 1 / num_classes) + 1 / num_classes


def annealed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the cross-entropies that count, and how many do, both scalars.

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)` int64.
        threshold: Probability of the right class above which an image does not count.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    counts = losses.detach() >= -math.log(threshold)
    return (losses * counts).sum(), counts.sum()


def consistency_loss(
    strong_logits: torch.Tensor,
    weak_logits: torch.Tensor,
    *,
    confidence_threshold: float,
    sharpening_temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence, a mean over all images of the batch, and the share of them that count, both scalars.

    Args:
        strong_logits: `(batch, classes)` of strongly augmented images; gets the gradient.
        weak_logits: `(batch, classes)` of the same images weakly augmented.
        confidence_threshold: Images whose largest weak probability, unsharpened, is below this add nothing.
        sharpening_temperature: Divides the weak logits.
    """
    weak = weak_logits.detach().float()
    confident = weak.softmax(1).amax(1) >= confidence_threshold
    target = (weak / sharpening_temperature).softmax(1)
    divergence = F.kl_div(strong_logits.float().log_softmax(1), target, reduction="none").sum(1)
    return (divergence * confident).mean(), confident.float().mean()
