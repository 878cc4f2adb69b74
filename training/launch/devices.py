"""Kinds of devices, by what torch's modules of them have in common: `torch.cuda`, `torch.xpu` and others."""

from typing import Any

import torch
from accelerate.utils import DistributedType

from hf_vicreg.training.errors import InputError

ALONE = "mps"  # a kind of which a machine has one, for one process


def accelerator_kind() -> str | None:
    """Return the kind of accelerator that this process may use, as `torch.device.type` names it; None without one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def device_module(device: torch.device | str) -> Any | None:
    """Return torch's module of a kind of device; None for the CPU, and for kinds that have none."""
    kind = torch.device(device).type
    return None if kind == "cpu" else getattr(torch, kind, None)


def device_name(device: torch.device) -> str:
    """Return what a device calls itself, or its kind."""
    named = getattr(device_module(device), "get_device_name", None)
    return device.type if named is None else named(device)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told to."""
    wait = getattr(device_module(device), "synchronize", None)
    if wait is not None:
        wait()


def free_cache(device: torch.device) -> None:
    """Give memory of a device back that its allocator keeps for later."""
    free = getattr(device_module(device), "empty_cache", None)
    if free is not None:
        free()


def has_bf16(kind: str) -> bool:
    """Return whether a kind of device computes in bf16 by itself; False where it does not say."""
    says = getattr(device_module(kind), "is_bf16_supported", None)
    if says is None:
        return False
    return says(including_emulation=False) if kind in ("cuda", "xpu") else says()


def rng_states(device: torch.device) -> list[torch.Tensor]:
    """Return torch's generator states, of the CPU and of the device where it is another."""
    own = getattr(device_module(device), "get_rng_state", None)
    return [torch.get_rng_state(), *([] if own is None else [own(device)])]


def restore_rng(states: list[torch.Tensor], device: torch.device) -> None:
    """Set torch's generators to what `rng_states` returned."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


def check_launcher(kind: DistributedType) -> None:
    """Check that a launcher leaves to each process a device, and the model to us.

    Raises:
        InputError: It shards models itself, or has a backend of its own beside torch's processes (XLA).
    """
    if kind is DistributedType.NO or kind.value.startswith("MULTI_"):
        return
    raise InputError(
        "`distributed_type`: expected NO or one with a device for each process, as MULTI_CPU, MULTI_GPU or MULTI_XPU, "
        f"got {kind.value}; choose one of training/launch, and add --shard_weights where no process can have all "
        "weights."
    )
