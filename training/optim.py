"""AdamW's parameter groups and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return AdamW's groups: matrices and kernels decay; biases, norms, scales, tokens and positions do not."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (
                exempt
                if parameter.ndim < 2 or name.endswith(("_token", "_tokens", "position_embeddings"))
                else decayed
            ).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to 0.

    Source: Loshchilov and Hutter 2016, SGDR (arXiv 1608.03983), without restarts.

    Args:
        step: From 0 to `num_steps` - 1.
        num_steps: Length of the schedule.
        peak: Learning rate at the end of the warm-up.
        warmup_ratio: Share of the steps that warm up.
    """
    warmup_steps = round(warmup_ratio * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Return torch's AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas)
