"""The machine a run may use: its device, cores and memory, within the limits that a container or a cluster sets."""

import contextlib
import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_vicreg.training.launch.cores import CGROUPS, MEMBERSHIP, cgroup_folders, usable_cores
from hf_vicreg.training.launch.devices import device_module, device_name

USABLE_RATIO = 0.9  # of the memory: the rest is for the file cache and for what a prediction misses


@dataclass(frozen=True)
class Machine:
    """What one process of a run may use.

    Attributes:
        device: `cpu`, `cuda`, `mps` or another kind.
        name: For people: the GPU's name, or the processor's cores.
        cores: CPU cores of this process.
        memory: Bytes that this process may come to hold on its device; on a CPU its own resident memory included.
        num_processes: Processes of the run, all alike.
    """

    device: str
    name: str
    cores: int
    memory: int
    num_processes: int = 1

    @property
    def usable_memory(self) -> int:
        """Bytes that a plan may use."""
        return int(self.memory * USABLE_RATIO)


def this_machine(
    device: torch.device, *, max_memory: int | None = None, num_processes: int = 1, local_processes: int = 1
) -> Machine:
    """Return the machine as this process sees it.

    Args:
        device: Where the run computes.
        max_memory: Bytes to stay below, for each process, where that is less than there is.
        num_processes: Of the run.
        local_processes: Of them on this machine: they share its memory and cores.
    """
    cores = max(1, usable_cores() // local_processes)
    # the CPU has none, nor `mps`, which shares its memory
    asked = getattr(device_module(device), "mem_get_info", None)
    if asked is not None:
        memory, name = asked(device)[0], device_name(device)
    else:
        # the others have met this one: what they hold is no longer available
        memory = resident_memory() + available_memory() // local_processes
        name = f"{cores} CPU core{'s' if cores > 1 else ''}" if device.type == "cpu" else device.type
    return Machine(device.type, name, cores, min(memory, max_memory or memory), num_processes)


def resident_memory() -> int:
    """Return the bytes of memory that this process holds."""
    return _status_bytes("VmRSS")


def peak_memory() -> int:
    """Return the most bytes this process held since `reset_peak`, or since it began."""
    return _status_bytes("VmHWM")


def reset_peak() -> bool:
    """Begin `peak_memory` anew; returns whether the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back_memory() -> None:
    """Return freed memory to the system where the C library keeps it (glibc): it would count as held."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_memory() -> int:
    """Return the bytes that this process may still take: of the machine's memory, and of each cgroup it is in."""
    return min([_machine_available(), *(max(0, limit - used) for limit, used in cgroup_limits())])


def _machine_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil  # type: ignore[import-untyped]  # macOS and Windows; a requirement of accelerate

    return psutil.virtual_memory().available


def _status_bytes(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", info.rss) if field == "VmHWM" else info.rss


def cgroup_limits(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> list:
    """Return (limit, used) in bytes of every cgroup above this process that has a limit, version 1 and 2.

    Inactive file pages count as used in a cgroup, but are given back when memory is asked for.
    """
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    found = []
    for folder, version in cgroup_folders("memory", root, membership):
        most, held, inactive = names[version]
        limit, used = _read_number(folder / most), _read_number(folder / held)
        if limit is not None and used is not None and limit < 2**60:
            found.append((limit, max(0, used - _stat(folder / "memory.stat", inactive))))
    return found


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # version 2 says `max` for none


def _stat(path: Path, field: str) -> int:
    try:
        rows = (line.split() for line in path.read_text().splitlines())
        return next((int(value) for name, value in rows if name == field), 0)
    except (OSError, ValueError):
        return 0
