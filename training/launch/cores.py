"""What this process may use of its machine's processor, and how many processes share it."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return the number of cores whose time this process may have: at least 1.

    Those it may run on, or what a container may use of them (docker's `--cpus`, Kubernetes' limits).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in cpu_quotas())]))


def local_processes() -> int:
    """Return how many processes of the run share what this one may use, as torchrun and accelerate say it.

    SLURM's and MPI's own counts do not say so: their tasks may each be bound to cores and a GPU of their own.
    """
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cpu_quotas(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> list[float]:
    """Return the cores' time that each cgroup above this process may use, where one is limited."""
    found = []
    for folder, version in cgroup_folders("cpu", root, membership):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if float(quota) > 0:  # -1 is none; version 2 says `max`
                found.append(float(quota) / float(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return found


def cgroup_folders(controller: str, root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Iterator[tuple[Path, int]]:
    """Yield the folder of every cgroup above this process that has a controller, and the version, 1 or 2."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        group = base / path.lstrip("/")
        # inside a container the path may be the host's, and the container's own group is the root
        for folder in dict.fromkeys([group, *group.parents, base]):
            if folder == base or base in folder.parents:
                yield folder, 1 if controllers else 2
