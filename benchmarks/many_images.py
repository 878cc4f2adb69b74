"""Memory and time of many images' names and order: `python -m benchmarks.many_images`.

Names are made up, no file is opened. Each form of the list is measured in a process of its own, with loader processes
that look names up at random as training does; the order is measured in another.
"""

import argparse
import itertools
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from hf_vicreg.training.images.files.file_names import FileNames
from hf_vicreg.training.images.order import SHUFFLED, StepSampler

FOLDER = "/data/images"


def made_up(count: int) -> Iterator[str]:
    """Yield paths like those of a large folder, a thousand images in each of its folders."""
    for index in range(count):
        yield f"{FOLDER}/part_{index // 1000:05d}/{index * 2654435761 % 2**32:08x}_{index % 1000:03d}.jpeg"


def memory(pid: int | str) -> dict[str, int]:
    """Return MB that a process has alone (USS) and with its share of what others have as well (PSS). Linux alone."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB", rollup, re.MULTILINE)}
    return {"uss_mb": (sizes["Private_Clean"] + sizes["Private_Dirty"]) // 1024, "pss_mb": sizes["Pss"] // 1024}


class Names(Dataset):
    """Looks names up; a sample is the worker's process."""

    def __init__(self, lists: Sequence[Sequence[str]], looks: int):
        self.lists, self.looks = lists, looks

    def __getitem__(self, index: int) -> int:
        drawn = random.Random(index)
        for _ in range(self.looks):
            for names in self.lists:
                assert names[drawn.randrange(len(names))]
        return os.getpid()

    def __len__(self) -> int:
        return 10**6


def of_names(form: str, count: int, workers: int, looks: int) -> dict[str, Any]:
    """Measure one form of the list: `tensors`, or `strings` as they were kept before."""
    before = memory("self")["uss_mb"]
    began = time.perf_counter()
    lists: list[Sequence[str]]
    if form == "tensors":
        names = FileNames.of(made_up(count), FOLDER, {".jpeg"})
        lists = [names, names.below(FOLDER)]
    else:
        paths = sorted(made_up(count))
        lists = [[os.path.relpath(path, FOLDER) for path in paths], paths]
    seconds = time.perf_counter() - began
    peak = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) // 1024
    own = memory("self")["uss_mb"] - before
    loader = DataLoader(Names(lists, looks // 100), batch_size=10, num_workers=workers, collate_fn=set)
    batches = iter(loader)  # kept: its workers end with it
    seen = set().union(*(next(batches) for _ in range(10 * workers)))  # each has looked at `looks` names or more
    found = [memory(pid) for pid in sorted(seen)]
    return {
        "form": form,
        "names": count,
        "seconds": round(seconds, 1),
        "list_mb": own,
        "peak_mb": peak,
        "looks_of_each_worker": looks,
        "workers": found,
    }


def of_order(count: int, order: str, first_step: int) -> dict[str, Any]:
    """Measure the first batch from a step on: seconds, and peak of what Python has allocated for it."""
    made = StepSampler(count, 256, 0, first_step, first_step + 2, 0, 1, order=order)
    began = time.perf_counter()
    next(iter(made))
    seconds = time.perf_counter() - began
    tracemalloc.start()
    next(iter(StepSampler(count, 256, 1, first_step, first_step + 2, 0, 1, order=order)))
    _, peak = tracemalloc.get_traced_memory()
    return {"order": order, "images": count, "step": first_step, "seconds": round(seconds, 5), "peak_bytes": peak}


def main() -> None:
    """Measure and print; `--only` is for the processes that this one starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=10**7)
    parser.add_argument("--images", type=int, default=10**9)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--looks", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--only", choices=["tensors", "strings"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(of_names(arguments.only, arguments.names, arguments.workers, arguments.looks)))
        return
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "names": [], "order": []}
    orders = [("keyed", arguments.images, 0), ("keyed", arguments.images, 10**6), (SHUFFLED, arguments.names // 10, 0)]
    for order, count, step in orders:
        found["order"].append(of_order(count, order, step))
        print(json.dumps(found["order"][-1]), flush=True)
    # few names first: what a process has without them
    for form, count in itertools.product(("tensors", "strings"), (1000, arguments.names)):
        words = [f"--only={form}", f"--names={count}", f"--workers={arguments.workers}", f"--looks={arguments.looks}"]
        command = [sys.executable, "-m", "benchmarks.many_images", *words]
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found["names"].append(json.loads(finished.stdout))
        print(json.dumps(found["names"][-1]), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
