"""Weights, gradients and the optimiser's state shared out over the processes, by torch's FSDP2, on GPUs or CPUs.

Each process holds an n-th of every weight. A layer's weights are gathered when it computes and let go afterwards; its
gradient is averaged over the processes, and each keeps its part. What leaves the training, checkpoints and models, is
gathered to whole tensors again, so that it is the same with any number of processes, shared out or not.

Source: Zhao et al. 2023, PyTorch FSDP (arXiv 2304.11277); Rajbhandari et al. 2019, ZeRO (arXiv 1910.02054), stage 3.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.launch.devices import restore_rng, rng_states

Module = TypeVar("Module", bound=nn.Module)


def shard_weights(model: nn.Module, modules: Sequence[nn.Module], device: torch.device) -> None:
    """Share out the weights of a model, in place; every process must call, with the same weights.

    What a transformers model names in `_no_split_modules`, its layers, is gathered one by one.

    Args:
        model: What has them.
        modules: Its parts, each called by itself.
        device: This process's.

    Raises:
        InputError: There are weights outside these parts.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inside = {id(one) for module in modules for one in module.parameters()}
    outside = [name for name, one in model.named_parameters() if id(one) not in inside]
    if outside:
        raise InputError(
            "`shard_weights`: expected an objective without weights beside encoder and expander, found "
            f"{outside[0]} and {len(outside) - 1} more; leave it out, or choose another objective."
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in modules:
        module.to(device)
        for one in units_of(module):
            fully_shard(one, mesh=mesh)


def units_of(module: nn.Module) -> list[nn.Module]:
    """Return what is gathered one after the other, without what has come before: a model's layers, then the rest."""
    layers = set(getattr(module, "_no_split_modules", None) or ())
    return [*(one for one in module.modules() if one is not module and type(one).__name__ in layers), module]


def largest_unit(modules: Sequence[nn.Module]) -> int:
    """Return the bytes of the weights of the largest of the modules' units."""
    largest = 0
    seen: set[int] = set()
    for module in modules:
        for unit in units_of(module):
            own = {id(one): one.nbytes for one in unit.parameters() if id(one) not in seen}
            seen |= own.keys()
            largest = max(largest, sum(own.values()))
    return largest


def is_sharded(found: torch.Tensor | nn.Module) -> bool:
    """Return whether a tensor, or any weight of a module, is shared out."""
    if isinstance(found, nn.Module):
        return any(map(is_sharded, found.parameters()))
    from torch.distributed.tensor import DTensor

    return isinstance(found, DTensor)


def own_share(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's share of a tensor, in place; of one that is not shared out all of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a whole; of one that is shared out every process must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensors: Mapping[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """Return whole copies on the CPU, one after the other: no device ever holds more than one beside its share.

    Of tensors that are shared out every process must call; those that keep nothing get none.
    """
    found = {}
    for name, tensor in tensors.items():
        one = whole(tensor.detach())
        if keep:
            found[name] = one.to("cpu", copy=True).contiguous()
    return found


def placed_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this process's share of a whole tensor where `like` is shared out, else the tensor."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    known: Any = like
    return distribute_tensor(tensor.to(like.device), known.device_mesh, known.placements, src_data_rank=None)


def unsharded(model: Module) -> Module:
    """Return a transformers model as it is, or of one that is shared out a whole copy on its device; all must call."""
    if not is_sharded(model):
        return model
    first = next(model.parameters())
    states = rng_states(first.device)  # making one draws numbers
    copied: Any = _class_before(model)(copy.deepcopy(model.config)).to(first.dtype)
    restore_rng(states, first.device)
    copied.load_state_dict(gathered(model.state_dict(), keep=True))
    return copied.to(first.device).train(model.training)


def _class_before(model: nn.Module) -> Any:
    """Return the class that a model had before `fully_shard` gave it one of its own."""
    from torch.distributed.fsdp import FSDPModule

    return next(one for one in type(model).__mro__ if not issubclass(one, FSDPModule))
