"""Processes, threads and precision of a run."""

import datetime
import gc
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from hf_vicreg.training.errors import InputError, RelayedError
from hf_vicreg.training.launch.cores import local_processes, usable_cores
from hf_vicreg.training.launch.devices import ALONE, accelerator_kind, check_launcher, has_bf16
from hf_vicreg.training.launch.meeting import meet

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def build_accelerator(
    mixed_precision: str,
    *,
    device: str = "auto",
    find_unused_parameters: bool = False,
    log_with: Sequence[str] = (),
    project_dir: Path | None = None,
    patience_s: float | None = None,
) -> Accelerator:
    """Return the accelerator, with threads set and precision chosen, both logged.

    Args:
        mixed_precision: `auto` is bf16 where a device other than the CPU has it, else full precision.
        device: `auto`, `cpu`, or the kind of a GPU that is there.
        find_unused_parameters: DistributedDataParallel's, at the price of a walk through the graph in each step.
        log_with: Trackers to send figures to.
        project_dir: Folder for the trackers' files.
        patience_s: How long a process waits for the others; default: torch's. One that has gone is noticed at once.

    Raises:
        InputError: fp16 without a GPU, more processes than GPUs, a launcher that shards the model, processes on a kind
            of device that accelerate does not connect, or another process ended with bad input.
    """
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    kind = accelerator_kind()
    # several processes without a device each share a batch on CPUs, and only if accelerate is told so
    use_cpu = device == "cpu" or _told_to_use_cpu() or not (is_alone or kind not in (None, ALONE))
    kind = None if use_cpu else kind
    if mixed_precision == "fp16" and kind in (None, ALONE):
        raise InputError("`mixed_precision`: expected a GPU for 'fp16', found none; use 'bf16' or 'no'.")
    local = local_processes()
    there = 0 if kind is None else torch.accelerator.device_count()
    if kind is not None and local > there:
        raise InputError(
            f"`num_processes`: expected at most the {there} GPU(s) of this machine, got {local}; "
            "add --device cpu for processes on CPUs."
        )
    if mixed_precision == "auto" and AcceleratorState._shared_state:
        mixed_precision = AcceleratorState().mixed_precision  # an earlier run's, in this Python
    elif mixed_precision == "auto":
        mixed_precision = "bf16" if kind is not None and has_bf16(kind) else "no"
    kwargs_handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)]
    if patience_s is not None:
        kwargs_handlers.append(InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=patience_s)))
    meet()
    _check_earlier_run(mixed_precision, device)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=use_cpu,
        log_with=list(log_with) or None,
        project_dir=project_dir,
        kwargs_handlers=kwargs_handlers,
    )
    check_launcher(accelerator.distributed_type)
    if not is_alone and accelerator.num_processes == 1:
        raise InputError(
            f"`num_processes`: expected processes that accelerate can connect on {kind}, it connects none; install "
            "what it needs for that, or add --device cpu."
        )
    threads = set_threads(local)
    logger.info(
        "device %s, %d process(es), %d threads each, mixed precision %s",
        accelerator.device.type,
        accelerator.num_processes,
        threads,
        mixed_precision,
    )
    return accelerator


def _check_earlier_run(precision: str, device: str) -> None:
    """Check that accelerate, which keeps one precision and one device a process, has no others than what is asked for.

    Raises:
        InputError: It has.
    """
    if not AcceleratorState._shared_state:
        return
    state = AcceleratorState()
    before = {"mixed_precision": state.mixed_precision, "device": state.device.type}
    for name, wanted in {"mixed_precision": precision, "device": device}.items():
        if wanted not in (before[name], "auto"):
            raise InputError(
                f"`{name}`: expected {before[name]!r}, which an earlier run in this Python set for all of it, "
                f"got {wanted!r}; start a new Python for it."
            )


def check_device(device: str) -> None:
    """Check that there is a device of the kind asked for.

    Raises:
        InputError: There is none, or the launcher keeps to the CPU.
    """
    there: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device not in there:
        return
    if _told_to_use_cpu():
        raise InputError(f"`device`: expected 'cpu' or 'auto' under a launcher told to use the CPU, got {device!r}.")
    if not there[device]():
        raise InputError(f"`device`: expected one that this machine has, found no {device!r}; use 'cpu' or 'auto'.")


def _told_to_use_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def set_threads(local_world_size: int) -> int:
    """Set and return this process's threads: the cores it may use, shared among the processes of the machine.

    `accelerate launch` without a configuration file sets one OpenMP thread a process, even for a single one.
    """
    threads = max(1, usable_cores() // local_world_size)
    torch.set_num_threads(threads)
    return threads


def gather_sets(values: set[int], accelerator: Accelerator) -> set[int]:
    """Return the union of a set over all processes; every process must call."""
    if accelerator.num_processes == 1:
        return set(values)
    return set(gather_object(sorted(values)))


def largest(values: Sequence[int], accelerator: Accelerator) -> list[int]:
    """Return the largest of each number over all processes; every process must call."""
    if accelerator.num_processes == 1:
        return list(values)
    shared = torch.tensor(values, device=accelerator.device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return shared.tolist()


def read_once(
    common: Sequence[Any], own: Sequence[torch.Tensor], accelerator: Accelerator
) -> tuple[list[float], list[float]]:
    """Return scalars of the device as numbers, by one transfer: the one time that a step waits for its device.

    Args:
        common: Of these the largest over all processes is returned; every one must call. The first lies on the device.
        own: Of these this process's; the norm of no gradient at all lies on the CPU.
        accelerator: Processes and device.
    """
    dtype, first = torch.promote_types(torch.float32, own[0].dtype), common[0]
    # a number is filled in: to copy it would wait once more
    shared = torch.stack(
        [one.to(dtype) if isinstance(one, torch.Tensor) else first.new_full((), one, dtype=dtype) for one in common]
    )
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    numbers = torch.cat([shared, torch.stack([one.detach().to(shared) for one in own])]).tolist()
    return numbers[: len(common)], numbers[len(common) :]


def host_group() -> torch.distributed.ProcessGroup:
    """Return the processes, connected by gloo: what they agree on there waits for no device; all must call."""
    world = torch.distributed.group.WORLD
    assert world is not None, "of several processes alone"
    if torch.distributed.get_backend() == "gloo":
        return world
    if _host_groups.get("world") is not world:
        _host_groups.update(world=world, host=torch.distributed.new_group(backend="gloo"))
    return _host_groups["host"]


_host_groups: dict[str, Any] = {}


def run_on_main(action: Callable[[], Result], accelerator: Accelerator) -> Result:
    """Run an action on the main process while the others wait, and return its result on all; every process must call.

    Raises:
        Exception: That of the action. The other processes raise its message as a RelayedError: none is left waiting
            for one that has gone.
    """
    failure: Exception | None = None
    told: list[Any] = [None, None]  # what went wrong, and the result
    if accelerator.is_main_process:
        try:
            told = [None, action()]
        except Exception as error:
            failure, told = error, [str(error), None]
    broadcast_object_list(told)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise RelayedError(told[0])
    return told[1]


def leave_processes() -> None:
    """End the group of processes that this one belongs to, if it does; before the interpreter exits.

    Cycles of references (models, hooks, accelerate's registers) keep the group's C++ part alive. Freed while the
    interpreter exits, with threads of its own still running, it aborts the process, as a third of runs did.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()
