"""Weights, gradients and the optimiser's state shared out over the processes, by torch's FSDP2, on GPUs or CPUs.

Each process holds an n-th of every weight. A layer's weights are gathered when it computes and let go afterwards; its
gradient is averaged over the processes, and each keeps its part. What leaves the training, checkpoints and models, is
gathered to whole tensors again, so that it is the same with any number of processes, shared out or not.

Where fewer than all processes share a copy of the weights (HSDP) there are several copies: weights are gathered within
the group that shares one, gradients averaged within it and then, of each part, between the groups.

Source: Zhao et al. 2023, PyTorch FSDP (arXiv 2304.11277), section 3.2.2 on hybrid sharding; Rajbhandari et al. 2019,
ZeRO (arXiv 1910.02054), stage 3.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.launch.devices import restore_rng, rng_states

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Module = TypeVar("Module", bound=nn.Module)


def refuse_shard_size(shard_size: int | None, processes: int) -> None:
    """Raise InputError for a number of processes that does not divide into groups of so many."""
    if shard_size is not None and processes % shard_size:
        fitting = ", ".join(str(one) for one in range(1, processes + 1) if processes % one == 0)
        raise InputError(
            f"`dp_shard_size`: expected a divisor of {processes} process(es), got {shard_size}; choose from {fitting}."
        )


def mesh_over(device: torch.device, shard_size: int | None) -> "DeviceMesh":
    """Return all processes in a row, or one row for each `shard_size` of them that share a copy of the weights.

    The processes of a row follow each other, as those of a machine do. Every process must call.
    """
    from torch.distributed.device_mesh import init_device_mesh

    processes = dist.get_world_size()
    if shard_size in (None, processes):
        return init_device_mesh(device.type, (processes,))
    shape = processes // shard_size, shard_size
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard_weights(model: nn.Module, modules: Sequence[nn.Module], device: torch.device, mesh: "DeviceMesh") -> None:
    """Share out the weights of a model, in place; every process must call, with the same weights.

    What a transformers model names in `_no_split_modules`, its layers, is gathered one by one.

    Args:
        model: What has them.
        modules: Its parts, each called by itself.
        device: This process's.
        mesh: Of `mesh_over`.

    Raises:
        InputError: There are weights outside these parts.
    """
    from torch.distributed.fsdp import fully_shard

    inside = {id(one) for module in modules for one in module.parameters()}
    outside = [name for name, one in model.named_parameters() if id(one) not in inside]
    if outside:
        raise InputError(
            "`shard_weights`: expected an objective without weights beside encoder and expander, found "
            f"{outside[0]} and {len(outside) - 1} more; leave it out, or choose another objective."
        )
    for module in modules:
        module.to(device)
        for one in units_of(module):
            fully_shard(one, mesh=mesh)


def average_copies(model: nn.Module, *, now: bool) -> None:
    """Let backward passes average gradients between the copies of the weights, or leave their sum to a later one."""
    from torch.distributed.fsdp import FSDPModule

    for one in model.modules():
        if isinstance(one, FSDPModule):
            one.set_requires_all_reduce(now, recurse=False)


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
