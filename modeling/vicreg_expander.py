"""The MLP from representations to embeddings that every method of pretraining puts on the encoder."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn

from .global_batch_norm import GlobalBatchNorm1d

HALF = (torch.float16, torch.bfloat16)


class VicRegExpander(nn.Module):
    """MLP from representations to embeddings; used in pretraining only.

    Normalisation and ReLU after every layer but the last, which has no bias, as in the authors' code.
    """

    def __init__(self, in_features: int, sizes: Sequence[int], norm: str):
        super().__init__()
        self.in_features = in_features
        widths = [in_features, *sizes]
        normalisation = GlobalBatchNorm1d if norm == "batch" else nn.LayerNorm
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths[:-1]))
        self.norm = nn.ModuleList(normalisation(width) for width in widths[1:-1])
        self.output = nn.Linear(widths[-2], widths[-1], bias=False)

    def forward(self, representations: torch.Tensor, process_group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Return embeddings `(batch, dimensions)` of representations `(batch, features)` of one view."""
        weight = self.output.weight
        # a method's own predictor gets float32, and may be stored in half precision
        states = representations.to(weight.dtype) if weight.dtype in HALF else representations
        for linear, norm in zip(self.hidden, self.norm, strict=True):
            states = linear(states)
            states = norm(states, process_group) if isinstance(norm, GlobalBatchNorm1d) else norm(states)
            states = states.relu()
        return self.output(states)


class NoExpander(nn.Module):
    """Stands for an expander where a method needs none: representations are the embeddings."""

    hidden: Sequence[nn.Linear] = ()
    norm: Sequence[nn.Module] = ()

    def __init__(self, in_features: int):
        super().__init__()
        self.in_features = in_features

    def forward(self, representations: torch.Tensor, process_group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Return the representations."""
        return representations


__all__ = ["NoExpander", "VicRegExpander"]
