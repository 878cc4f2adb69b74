"""Patch embedding by small convolutions: each halves the image, instead of one that cuts it into patches."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .configuration_bigbird_vit import BigBirdViTConfig


class BigBirdViTConvStem(nn.Module):
    """Convolutions of 3x3 pixels with stride 2, one for each halving from the image to the grid of patches.

    The idea is that of Xiao et al. 2021, arXiv 2106.14881: channels double from layer to layer, and a linear map makes
    tokens of the last. A layer norm over the channels of each pixel stands in place of their batch norm, so that an
    image's tokens hang neither on the other images of its batch nor on padding around it.
    """

    def __init__(self, config: BigBirdViTConfig):
        super().__init__()
        halvings = config.patch_size_hw[0].bit_length() - 1
        widths = [max(8, config.hidden_size >> halvings - 1 - layer) for layer in range(halvings)]
        self.patch_size = config.patch_size_hw[0]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, width, kernel_size=3, stride=2, padding=1, bias=False)
            for channels, width in zip([config.num_channels, *widths], widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=config.layer_norm_eps) for width in widths)
        self.activation = ACT2FN[config.hidden_act]
        self.projection = nn.Linear(widths[-1], config.hidden_size)

    @property
    def weight(self) -> torch.Tensor:
        """The weights of the first convolution, which say the type that images are to have."""
        weight = self.convolutions[0].weight
        assert isinstance(weight, torch.Tensor)  # for the type checker
        return weight

    def forward(self, pixel_values: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Return `(batch, hidden_size, rows, columns)` of `(batch, channels, height, width)`.

        Patches that `valid` `(batch, rows, columns)` leaves out are zero before each layer, as if the image ended
        there.
        """
        rows, columns = (side // self.patch_size for side in pixel_values.shape[-2:])
        # pixels that fill no whole patch are left out
        states = pixel_values[..., : rows * self.patch_size, : columns * self.patch_size]
        states = states.contiguous(memory_format=torch.channels_last)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            states = convolution(_shown(states, valid))
            states = self.activation(norm(states.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.projection(states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _shown(states: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Return `(batch, channels, height, width)` with zeros where patches are not valid."""
    if valid is None:
        return states
    return states * F.interpolate(valid[:, None].to(states.dtype), size=states.shape[-2:], mode="nearest")


__all__ = ["BigBirdViTConvStem"]
