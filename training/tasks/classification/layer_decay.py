"""Layer-wise decay of the learning rate: what pretraining learned first is changed least."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_vicreg.training.engine.optim import parameter_groups


def decayed_groups(model: PreTrainedModel, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups of `parameter_groups`, split by layer: `scale` is the factor on the learning rate.

    The head has scale 1, the last layer `layer_decay`, the one before its square, and so on to the embeddings.
    Source: Clark et al. 2020, ELECTRA (arXiv 2003.10555), appendix; Bao et al. 2021, BEiT (arXiv 2106.08254).
    """
    depths = layer_depths(model)
    deepest = max(depths.values(), default=0)
    by_identity = {id(parameter): depths[name] for name, parameter in model.named_parameters()}
    groups = []
    for group in parameter_groups(model, weight_decay):
        by_depth: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_depth.setdefault(by_identity[id(parameter)], []).append(parameter)
        for depth, parameters in sorted(by_depth.items()):
            scale = layer_decay ** (deepest - depth)
            groups.append(group | {"params": parameters, "scale": scale})
    return groups


def layer_depths(model: PreTrainedModel) -> dict[str, int]:
    """Return for each parameter how deep it lies: 0 before the layers, then their number from 1, then what follows.

    The layers are the encoder's longest list of modules, whatever it is called (stages, for a ResNet).
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    names = [name for name, _ in model.named_parameters()]
    if not lists:
        return dict.fromkeys(names, 0)
    layers = max(lists, key=lambda name: (len(lists[name]), -name.count(".")))
    depths, seen = {}, 0
    for name in names:  # in the order of the modules
        if name.startswith(f"{layers}."):
            seen = int(name.removeprefix(f"{layers}.").split(".")[0]) + 1
            depths[name] = seen
        else:
            depths[name] = len(lists[layers]) + 1 if seen else 0
    return depths
