"""The optimisers, their parameter groups, and the learning rate as a pure function of the step."""

import logging
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_vicreg.training.engine.unseen import unseen_parameters

logger = logging.getLogger(__name__)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on each matrix or kernel is scaled by `eta * |p| / |d|`, d with the decay added.

    Parameters of fewer than two dimensions, biases and norms, neither decay nor adapt. Nor does one whose own or whose
    update's norm is 0 adapt.

    Source: You, Gitman and Ginsburg 2017 (arXiv 1708.03888) as VICReg's authors run it (facebookresearch/vicreg,
    `main_vicreg.py`): the decay is part of the adapted direction; the learning rate multiplies the momentum buffer.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, weight_decay: float = 0.0, momentum: float = 0.9, eta: float = 1e-3
    ):
        """Set up parameter groups, each of which may override the four numbers."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; `closure` is not supported, the name is torch's."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                direction = parameter.grad
                if parameter.ndim > 1:
                    direction = direction.add(parameter, alpha=group["weight_decay"])
                    direction = direction * _trust_ratio(parameter, direction, group["eta"])
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(direction)
                parameter.add_(buffer, alpha=-group["lr"])


def _trust_ratio(parameter: torch.Tensor, direction: torch.Tensor, eta: float) -> torch.Tensor:
    """Return the scalar `eta * |p| / |d|`, 1 where either norm is 0; on the device, without waiting for it."""
    own, update = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(direction)
    return torch.where((own > 0) & (update > 0), eta * own / update, 1.0)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return an optimiser's groups: matrices and kernels decay; biases, norms, scales, tokens and positions do not.

    Parameters that the loss cannot see are in neither, see `unseen.py`.
    """
    unseen = unseen_parameters(model)
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in unseen:
            (
                exempt
                if parameter.ndim < 2 or name.endswith(("_token", "_tokens", "position_embeddings"))
                else decayed
            ).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_ratio: float, least: float = 0.0) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine.

    Source: Loshchilov and Hutter 2016, SGDR (arXiv 1608.03983), without restarts.

    Args:
        step: From 0 to `num_steps` - 1.
        num_steps: Length of the schedule.
        peak: Learning rate at the end of the warm-up.
        warmup_ratio: Share of the steps that warm up.
        least: Learning rate that the cosine ends at.
    """
    warmup_steps = round(warmup_ratio * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(
    model: nn.Module, optim: str, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Return torch's AdamW or `LARS` over `parameter_groups`; `betas` are AdamW's."""
    groups = parameter_groups(model, weight_decay)
    unseen = unseen_parameters(model)
    if unseen:
        logger.info(
            "%d biases that the loss cannot see stay as they are: %s%s",
            len(unseen),
            ", ".join(list(unseen)[:4]),
            ", ..." if len(unseen) > 4 else "",
        )
    optimizer: torch.optim.Optimizer
    if optim == "lars":
        optimizer = LARS(groups, lr=learning_rate)
    else:
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas)
    optimizer.register_load_state_dict_pre_hook(partial(_read_state_of_before, _order_of_before(model, groups)))
    return optimizer


def _order_of_before(model: nn.Module, groups: list[dict]) -> list[nn.Parameter | None]:
    """The order of states in checkpoints that had one for unseen parameters and for the empty table of registers."""
    decayed, held = groups[0]["params"], {one for group in groups for one in group["params"]}
    unseen = set(unseen_parameters(model).values())
    exempt: list[nn.Parameter | None] = []
    for name, parameter in model.named_parameters():
        if parameter in unseen or (parameter in held and not any(parameter is one for one in decayed)):
            exempt.append(parameter)
            owner = model.get_submodule(name.rpartition(".")[0])
            if name.endswith("embeddings.cls_token") and getattr(owner, "register_tokens", False) is None:
                exempt.append(None)
    return [*decayed, *exempt]


def _read_state_of_before(
    before: list[nn.Parameter | None], optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any] | None:
    held = [one for group in optimizer.param_groups for one in group["params"]]
    if max(state_dict["state"], default=-1) < len(held):
        return None
    places = {id(parameter): index for index, parameter in enumerate(before)}
    found = {new: state_dict["state"].get(places[id(parameter)]) for new, parameter in enumerate(held)}
    return state_dict | {"state": {index: entry for index, entry in found.items() if entry is not None}}
