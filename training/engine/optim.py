"""The optimisers, their parameter groups, and the learning rate as a pure function of the step."""

import logging
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.modeling.vicreg_expander import VicRegExpander
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
            positions = "position_embedding" in name or "relative_position_bias" in name
            free = parameter.ndim < 2 or positions or name.endswith(("_token", "_tokens"))
            (exempt if free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def decayed_groups(
    model: nn.Module, weight_decay: float, layer_decay: float, depths: dict[str, int] | None = None
) -> list[dict[str, Any]]:
    """Return the groups of `parameter_groups`, split by layer: `scale` is the factor on the learning rate.

    What follows the layers has scale 1, the last layer `layer_decay`, the one before its square, and so on to the
    embeddings: what was learned first is changed least. Source: Clark et al. 2020, ELECTRA (arXiv 2003.10555),
    appendix; Bao et al. 2021, BEiT (arXiv 2106.08254).

    Args:
        model: What is trained.
        weight_decay: Of matrices and kernels.
        layer_decay: The factor from a layer to the one before.
        depths: Of each parameter; default: of `layer_depths`.
    """
    depths = layer_depths(model) if depths is None else depths
    deepest = max(depths.values(), default=0)
    by_identity = {id(parameter): depths[name] for name, parameter in model.named_parameters()}
    groups = []
    for group in parameter_groups(model, weight_decay):
        by_depth: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_depth.setdefault(by_identity[id(parameter)], []).append(parameter)
        for depth, parameters in sorted(by_depth.items()):
            groups.append(group | {"params": parameters, "scale": layer_decay ** (deepest - depth)})
    return groups


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Return for each parameter how deep it lies: 0 before the layers, then their number from 1, then what follows.

    The layers are the encoder's longest list of modules behind its embeddings, whatever it is called; where that lies
    within another, as blocks within stages do, the outer one.
    """
    names = [name for name, _ in model.named_parameters()]
    layers, count = _layers_of(model)
    if not count:
        return dict.fromkeys(names, 0)
    depths, seen = {}, 0
    for name in names:  # in the order of the modules
        if name.startswith(f"{layers}."):
            seen = int(name.removeprefix(f"{layers}.").split(".")[0]) + 1
            depths[name] = seen
        else:
            depths[name] = count + 1 if seen else 0
    return depths


def num_layers(encoder: nn.Module) -> int:
    """Return how many layers an encoder has, as `layer_depths` counts them."""
    return _layers_of(encoder)[1]


def _layers_of(model: nn.Module) -> tuple[str, int]:
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    behind = {name: one for name, one in lists.items() if "embeddings" not in name.split(".")} or lists
    longest = max(behind, key=lambda name: (behind[name], -name.count(".")), default="")
    # blocks within stages, as ConvNeXt and Swin have them: the stages are its layers
    around = [name for name in behind if behind[name] > 1 and longest.startswith(f"{name}.")]
    layers = min([longest, *around], key=len)
    return layers, behind.get(layers, 0)


def _depths_of_wrapper(model: VicRegForPreTraining) -> dict[str, int]:
    """Depths of the parameters of the first encoder, which may be pretrained; all others follow its layers."""
    own = {f"encoder.{name}": depth for name, depth in layer_depths(model.encoder).items()}
    last = num_layers(model.encoder) + 1
    return {name: own.get(name, last) for name, _ in model.named_parameters()}


def learning_rate_at(
    step: int,
    num_steps: int,
    peak: float,
    warmup_ratio: float,
    least: float = 0.0,
    expander_warmup_ratio: float = 0.0,
) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine.

    Source: Loshchilov and Hutter 2016, SGDR (arXiv 1608.03983), without restarts.

    Args:
        step: From 0 to `num_steps` - 1.
        num_steps: Length of the schedule.
        peak: Learning rate at the end of the warm-up.
        warmup_ratio: Share of the steps that warm up.
        least: Learning rate that the cosine ends at.
        expander_warmup_ratio: Share of the steps that come before all that: a linear warm-up of their own, then the
            peak.
    """
    first_steps = round(expander_warmup_ratio * num_steps)
    if step < first_steps:
        return peak * min(1.0, (step + 1) / max(1, round(warmup_ratio * first_steps)))
    step, num_steps = step - first_steps, num_steps - first_steps
    warmup_steps = round(warmup_ratio * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(
    model: VicRegForPreTraining,
    optim: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    layer_decay: float = 1.0,
    expander_lr_scale: float = 1.0,
) -> torch.optim.Optimizer:
    """Return torch's AdamW or `LARS` over `parameter_groups`, or `decayed_groups`; `betas` are AdamW's.

    `expander_lr_scale` is the factor on the learning rate of expanders: AdamW's steps change a layer's output the more
    the wider its input is, and expanders are many times wider than encoders. Source: Yang et al. 2022, Tensor Programs
    V (arXiv 2203.03466), table 3: with Adam the learning rate of a hidden matrix goes with the inverse of its width.
    """
    groups = before = parameter_groups(model, weight_decay)
    if layer_decay != 1:
        groups = decayed_groups(model, weight_decay, layer_decay, _depths_of_wrapper(model))
    if expander_lr_scale != 1:
        groups = _with_slow_expanders(model, groups, expander_lr_scale)
    unseen = unseen_parameters(model)
    if unseen:
        logger.info(
            "%d biases make no difference to the loss and are not trained: %s%s",
            len(unseen),
            ", ".join(list(unseen)[:4]),
            ", ..." if len(unseen) > 4 else "",
        )
    optimizer: torch.optim.Optimizer
    if optim == "lars":
        optimizer = LARS(groups, lr=learning_rate)
    else:
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas)
    optimizer.register_load_state_dict_pre_hook(partial(_read_state_of_before, _order_of_before(model, before)))
    return optimizer


def _with_slow_expanders(model: nn.Module, groups: list[dict[str, Any]], scale: float) -> list[dict[str, Any]]:
    """Split each group: what belongs to an expander, or to a predictor of the same kind, has its `scale` lowered."""
    heads = (module for module in model.modules() if isinstance(module, VicRegExpander))
    slow = {id(one) for head in heads for one in head.parameters()}
    found = []
    for group in groups:
        rest = [one for one in group["params"] if id(one) not in slow]
        found.append(group | {"params": rest})
        held = [one for one in group["params"] if id(one) in slow]
        found.append(group | {"params": held, "scale": scale * group.get("scale", 1.0)})
    return [group for group in found if group["params"]]


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
