"""The log of a run: a line of JSON every so many steps, timed, watched, and sent to trackers where there are any."""

import json
import math
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_vicreg.model_cards.schema import check_log_record
from hf_vicreg.training.errors import room_in
from hf_vicreg.training.launch.distributed import run_on_main
from hf_vicreg.training.launch.signals import end_workers
from hf_vicreg.training.monitor.diagnosis import Verdict, Watch
from hf_vicreg.training.objectives.entry import ObjectiveEntry
from hf_vicreg.training.objectives.vicreg import VICREG

LOG_FILE = "log.jsonl"
COUNTED_AFTER_S = 10.0


@dataclass(frozen=True)
class StepCost:
    """What the steps of a run cost, all processes together.

    Attributes:
        flops: Of a step, in products of matrices.
        held_flops: Of one in which the encoders are held still.
        held_ratio: Share of the run's steps, the first ones, in which they are.
        peak: FLOP/s of the devices at most; None where that is not known.
    """

    flops: int
    held_flops: int = 0
    held_ratio: float = 0.0
    peak: float | None = None

    def at(self, step: int, num_steps: int) -> int:
        """Return the FLOPs of a step, by how many of how many come before it."""
        return self.held_flops if step < round(self.held_ratio * num_steps) else self.flops


class LateCost:
    """What steps cost, counted when they have taken so long that the count hardly shows.

    Attributes:
        found: The cost; None before it is counted, and where it cannot be.
    """

    def __init__(self, count: Callable[[], StepCost | None]):
        """Take what counts it; that is called once at most."""
        self.found: StepCost | None = None
        self._count: Callable[[], StepCost | None] | None = count

    def after(self, seconds: float) -> StepCost | None:
        """Return the cost after so many seconds of training, if there is one by then."""
        if self._count is not None and seconds >= COUNTED_AFTER_S:
            count, self._count = self._count, None
            self.found = count()
        return self.found


class Stopwatch:
    """Counts and times the steps between two lines of the log."""

    def __init__(self, cost: LateCost | None = None, num_steps: int = 0) -> None:
        """Begin; `cost` is that of steps of a run of `num_steps`."""
        self.cost, self.num_steps, self.began = cost, num_steps, time.perf_counter()
        self._restart()

    def _restart(self) -> None:
        self.started, self.waited, self.images, self.grad_norm_max = time.perf_counter(), 0.0, 0, 0.0
        self.steps: list[int] = []

    def waits(self, batches: Iterable[Any]) -> Generator[Any, None, None]:
        """Yield the batches, adding up how long each one was waited for; closed early, it ends their loader."""
        iterator = iter(batches)
        try:
            while True:
                asked = time.perf_counter()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                self.waited += time.perf_counter() - asked
                yield batch
        finally:
            end_workers(iterator)

    def count(self, images: int, grad_norm: float, step: int) -> None:
        """Note a step: its images over all processes, the norm of its gradient, and how many come before it."""
        self.images += images
        self.steps.append(step)
        if math.isfinite(grad_norm):  # else the step is left out
            self.grad_norm_max = max(self.grad_norm_max, grad_norm)

    def exclude(self, seconds: float) -> None:
        """Leave out time spent on something else than training."""
        self.started += seconds

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the figures of these steps, by their names in the log, and begin anew; every process must call."""
        seconds = time.perf_counter() - self.started
        # one process that waits makes all the others wait for it: the longest wait is the run's
        waited = accelerator.gather(torch.tensor([self.waited / seconds], device=accelerator.device)).max().item()
        found = {
            "grad_norm_max": self.grad_norm_max,
            "data_wait_ratio": min(1.0, waited),
            "images_per_second": self.images / seconds,
        }
        cost = None if self.cost is None else self.cost.after(time.perf_counter() - self.began)
        if cost is not None and self.steps:
            found["flops_per_second"] = sum(cost.at(step, self.num_steps) for step in self.steps) / seconds
            if cost.peak is not None:
                found["mfu"] = found["flops_per_second"] / cost.peak
        self._restart()
        return found


class RunLog:
    """The log of a run on its main process; the others have none, and what is written there goes nowhere."""

    def __init__(
        self,
        folder: Path | None,
        step: int,
        accelerator: Accelerator,
        gamma: float | None = None,
        objective: ObjectiveEntry = VICREG,
    ):
        """Continue the log at a step, or begin it; every process must call.

        Args:
            folder: The run's; None keeps no log.
            step: Steps done; lines of later ones, which will be done again, are dropped.
            accelerator: Its trackers get every line.
            gamma: Target of the embeddings' standard deviation where a log of pretraining is to be watched.
            objective: What is learned.

        Raises:
            InputError: The disk is full.
        """
        self.accelerator = accelerator
        self.watch = None if gamma is None else Watch(gamma, objective)
        self.path = None if folder is None else folder / LOG_FILE

        def begin(path: Path) -> None:
            with room_in(path.parent):
                for record in truncate_log(path, step):
                    self._follow(record)

        if self.path is not None:
            run_on_main(partial(begin, self.path), accelerator)

    def write(self, record: dict[str, Any]) -> list[Verdict]:
        """Append a line, send it to the trackers, and return what is found wrong for the first time.

        Every process must call; on the others than the main one nothing is ever found.

        Raises:
            InputError: The disk is full.
        """
        figures = {key: value for key, value in record.items() if key != "step"}
        self.accelerator.log(figures, step=record["step"])

        def append(path: Path) -> None:
            with room_in(path.parent), path.open("a") as file:
                file.write(json.dumps(record) + "\n")

        if self.path is not None:
            run_on_main(partial(append, self.path), self.accelerator)
        return self._follow(record) if self.accelerator.is_main_process else []

    def _follow(self, record: dict[str, Any]) -> list[Verdict]:
        return [] if self.watch is None else self.watch.follow(record)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the figures of a log's lines, none if there is no log yet, without a line that a kill cut short."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            record = check_log_record(json.loads(line))
        except (ValueError, RecursionError):
            continue
        if record is not None:
            records.append(record)
    return records


def truncate_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop lines of steps that will be done again, and a line cut short by a kill; return those that stay."""
    if not path.exists():
        return []
    kept = [record for record in read_log(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    temporary.replace(path)
    return kept
