"""How many steps the time holds, and a clock that knows when the command began."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from hf_vicreg.training.errors import InputError

SPARE_RATIO = 0.95  # of the time that is left: a machine is never quite as fast as it was just measured
CLOSING_SECONDS = 4.0  # curves, export and card
MARGIN = 1.25  # on a budget that is advised: with more time, more steps are tried before the first


@dataclass(frozen=True)
class Rate:
    """What a trial measured.

    Attributes:
        step_seconds: A step, its data included; the median.
        peak_memory: The most bytes held meanwhile.
        images: Of a step, over all processes.
    """

    step_seconds: float
    peak_memory: int
    images: int

    @property
    def images_per_second(self) -> float:
        """Over all processes."""
        return self.images / self.step_seconds


def steps_within(
    seconds: float, step_seconds: float, steps_per_epoch: int, *, most_epochs: int, images: int, budget: float
) -> int:
    """Return how many steps fit into the seconds that are left for them.

    Args:
        seconds: Left for training.
        step_seconds: Of one step.
        steps_per_epoch: Of a pass over the images.
        most_epochs: More passes than that are not made.
        images: In a pass, for the advice.
        budget: Seconds that were given for all; also for the advice.

    Raises:
        InputError: Not even one pass over the images.
    """
    steps = int(seconds * SPARE_RATIO / step_seconds)
    if steps < steps_per_epoch:
        needed = steps_per_epoch * step_seconds / SPARE_RATIO
        fitting = int(images * max(0, steps) / steps_per_epoch)
        remedy = f", or --max_train_samples {fitting}" if fitting >= 64 else ""
        enough = _rounded_up((budget - seconds + needed) * MARGIN)
        raise InputError(
            f"`time_budget`: expected time for one pass over the images at least, {words(needed)} of training beside "
            f"the start, found {words(max(0.0, seconds))} left; the least is about --time_budget {enough}{remedy}."
        )
    return min(steps, most_epochs * steps_per_epoch)


def _rounded_up(seconds: float) -> str:
    """Return a time as `--time_budget` takes it, rounded up: `70s`, `4m`, `13h`."""
    if seconds <= 120:
        return f"{math.ceil(seconds / 10) * 10}s"
    return f"{math.ceil(seconds / 60)}m" if seconds <= 7200 else f"{math.ceil(seconds / 3600)}h"


def seconds_since_start() -> float:
    """Return how long this process has been running: importing torch is part of what a person waits for."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        import os

        return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.process_time()


def words(seconds: float) -> str:
    """Return seconds as people say them: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
