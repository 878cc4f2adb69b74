"""An exponential moving average of the encoders' weights, which is evaluated and exported in their place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hf_vicreg.training.launch.sharding import is_sharded, own_share, placed_like, shard_weights, unsharded

AVERAGE_FILE = "average.safetensors"


class WeightAverage:
    """Weights that follow the encoders': `average = d average + (1 - d) weights` after each step.

    With n averages taken before, d is `min(decay, (1 + n) / (10 + n))`: an average of few steps does not remember the
    random weights of the first. The very first one is a copy. Buffers (batch norms' statistics) are averaged alike,
    whole numbers copied. A step that is left out is not averaged.

    Source: Tarvainen and Valpola 2017, Mean teachers (arXiv 1703.01780); the warm-up is that of TensorFlow's
    `ExponentialMovingAverage`.
    """

    def __init__(self, encoders: Sequence[nn.Module], decay: float):
        """Begin with copies of the encoders, on their devices, and shared out as they are; every process must call."""
        self.decay = decay
        self.encoders = encoders
        self.count = 0  # a number, as reading torch's own off a device would wait for it
        copies = nn.ModuleList([unsharded(one) for one in encoders])
        self.averaged = AveragedModel(copies, multi_avg_fn=self._follow, use_buffers=True)
        self.averaged.requires_grad_(False).eval()
        if is_sharded(encoders[0]):
            known: Any = next(encoders[0].parameters())
            shard_weights(self.averaged, self.averages, next(copies.parameters()).device, known.device_mesh)

    @property
    def averages(self) -> list[nn.Module]:
        """The averaged encoders, in evaluation mode."""
        return list(self.averaged.module.children())

    def update(self) -> None:
        """Follow the encoders after a step."""
        self.averaged.update_parameters(nn.ModuleList(self.encoders))
        self.count += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint holds of the average."""
        return {name: tensor.detach() for name, tensor in self.averaged.state_dict().items()}

    def load(self, checkpoint: Path) -> None:
        """Take over a checkpoint's average."""
        own, found = self.averaged.state_dict(), load_file(checkpoint / AVERAGE_FILE)
        self.averaged.load_state_dict({name: placed_like(one, own[name]) for name, one in found.items()})
        self.count = int(self.averaged.n_averaged)

    def gather(self) -> None:
        """Hold whole weights from now on, for the end of a run; every process must call."""
        self.averaged.module = nn.ModuleList([unsharded(one) for one in self.averages])

    @torch.no_grad()
    def _follow(self, averages: Any, weights: Any, _: Any) -> None:
        """Move averages towards weights, in place; all of them are on one device and of one type."""
        averages, weights = ([own_share(one) for one in part] for part in (averages, weights))
        if averages[0].is_floating_point():
            decay = min(self.decay, (1 + self.count) / (10 + self.count))
            torch._foreach_lerp_(averages, weights, 1 - decay)
        else:
            torch._foreach_copy_(averages, weights)
