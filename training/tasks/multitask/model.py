"""Several models of transformers on one encoder, and how their losses become one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTModel

LOG_VARIANCES = "log_variances"


class MultitaskModel(nn.Module):
    """Whole models, one a task, whose encoders have the same parameters as `encoder`.

    Attributes:
        encoder: What is shared.
        heads: Each task's model, by its name; what is not its encoder is its head.
        log_variances: `(tasks,)`, s of `balanced_loss`, in the order of the heads; None where weights are fixed.
    """

    def __init__(
        self,
        encoder: BigBirdViTModel,
        heads: Mapping[str, PreTrainedModel],
        loss_scales: Mapping[str, float],
        likelihood_factors: Mapping[str, float],
        weights: Mapping[str, float] | None,
    ):
        """Let the heads share the encoder's parameters, in place.

        Args:
            encoder: With its weights.
            heads: Models that hold an encoder of the same architecture.
            loss_scales: Factors on their losses, to begin with.
            likelihood_factors: c of `balanced_loss`.
            weights: Of their losses; None: learned.
        """
        super().__init__()
        self.encoder = encoder
        for head in heads.values():
            share_parameters(encoder, head)
        self.heads = nn.ModuleDict(heads)
        self.loss_scales, self.likelihood_factors, self.weights = loss_scales, likelihood_factors, weights
        self.log_variances = None if weights else nn.Parameter(torch.zeros(len(heads)))

    def forward(self, inputs: Mapping[str, dict[str, Any]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to be minimised, and each task's own.

        Args:
            inputs: For each task what its model takes, labels among it.
        """
        losses = {name: self.loss_scales[name] * self.heads[name](**one).loss.float() for name, one in inputs.items()}
        return self.balanced(losses), losses

    def balanced(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the tasks' losses, scalars in the order of the heads, as one."""
        stacked = torch.stack([losses[name] for name in self.heads])
        if self.weights is not None:
            return (stacked * torch.tensor([self.weights[name] for name in self.heads]).to(stacked)).sum()
        assert self.log_variances is not None
        factors = torch.tensor([self.likelihood_factors[name] for name in self.heads]).to(stacked)
        return balanced_loss(stacked, self.log_variances, factors)

    @torch.no_grad()
    def present_weights(self) -> dict[str, torch.Tensor]:
        """Return what each task's loss is multiplied by now, scalars."""
        if self.log_variances is None:
            assert self.weights is not None
            return {name: torch.tensor(weight) for name, weight in self.weights.items()}
        factors = (self.likelihood_factors[name] for name in self.heads)
        return {
            name: factor * weight
            for name, factor, weight in zip(self.heads, factors, (-self.log_variances.detach()).exp(), strict=True)
        }


def balanced_loss(losses: torch.Tensor, log_variances: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return the sum over tasks of `c * exp(-s) * L + s / 2`, a scalar.

    Source: Kendall, Gal and Cipolla 2018 (arXiv 1705.07115), equations 7 and 10, with s = log of the noise's variance:
    c is 1/2 for a squared error, whose likelihood is a Gaussian's, and 1 for a cross-entropy. The losses of detection,
    segmentation and captioning are taken for such, though the first one is no likelihood.

    Args:
        losses: `(tasks,)`, L.
        log_variances: `(tasks,)`, s.
        factors: `(tasks,)`, c.
    """
    return (factors * (-log_variances).exp() * losses + log_variances / 2).sum()


def share_parameters(encoder: BigBirdViTModel, head: nn.Module) -> None:
    """Put an encoder's parameters into the place of those of the encoder in a head, in place; it has no buffers.

    Each head keeps modules of its own around them: which layers it reads is its own business.
    """
    (inner,) = (module for module in head.modules() if isinstance(module, BigBirdViTModel))
    shared = dict(encoder.named_parameters())
    assert not list(inner.named_buffers())
    for name, _ in list(inner.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        setattr(inner.get_submodule(owner), attribute, shared[name])
