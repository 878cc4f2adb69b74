"""What a loop is given: where it stands, the model, its batches, and how a step gets its gradient."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from hf_vicreg.model_cards.results import in_flops
from hf_vicreg.training.engine.average import WeightAverage
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.order import KEYED
from hf_vicreg.training.monitor.run_log import LateCost

Outcome = TypeVar("Outcome")


@dataclass
class RunState:
    """Where a run stands, beside its tensors.

    Attributes:
        step: Optimiser steps done.
        recipe: The resolved configuration, to refuse a checkpoint of another one.
        data_fingerprint: The same for the data.
        knn: k-NN accuracies measured so far, by what they measure.
        linear: The same of linear probes.
        unusable: Indices of corrupt or too small images met so far.
        training_seconds: Time spent, over all interruptions.
        skipped_steps: Steps left out because loss or gradient was not finite.
        scaler: State of the gradient scaler of fp16, empty without one.
        order: How the order of images follows from the seed; a run keeps the one that it began with.
        cursors: Where the lanes through shards stand, by their number; empty where images have an index.
        attention: The form of attention by grid, `ROWSxCOLUMNS`, where it was chosen by trying; a run keeps it.
    """

    step: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)
    data_fingerprint: str = ""
    knn: dict[str, float] = field(default_factory=dict)
    linear: dict[str, float] = field(default_factory=dict)
    unusable: list[int] = field(default_factory=list)
    training_seconds: float = 0.0
    skipped_steps: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    order: str = KEYED
    cursors: dict[str, list[int]] = field(default_factory=dict)
    attention: dict[str, str] = field(default_factory=dict)

    def note(self, accuracies: dict[str, dict[str, float]]) -> None:
        """Add accuracies of kinds `knn` and `linear`."""
        self.knn |= accuracies["knn"]
        self.linear |= accuracies.get("linear", {})


class DeviceFull(Exception):  # noqa: N818 - the step is taken again in smaller pieces
    """A process ran out of its device's memory; raised on all of them."""


class TrainingStep(ABC, Generic[Outcome]):
    """One kind of training; what `backward` returns is its `Outcome`.

    Attributes:
        model: The model itself, not what accelerate wraps around it.
        optimizer: As accelerate prepared it. A group's `scale`, if it has one, is a factor on its learning rate.
        num_steps: Of the whole run.
        steps_per_epoch: Of one pass over the images.
        images_per_step: Over all processes.
        pieces: Batches of the loader that make up a step.
        average: Follows the weights after each step, where that is asked for.
        order: Of the images, as `RunState` names it.
        cost: FLOPs of a step, where they can be counted.
    """

    model: nn.Module
    optimizer: Any
    num_steps: int
    steps_per_epoch: int
    images_per_step: int
    pieces: int = 1
    average: WeightAverage | None = None
    order: str = KEYED
    cost: LateCost | None = None

    @abstractmethod
    def batches(self, first_step: int) -> Iterable[Any]:
        """Return this process's batches from a step on, `pieces` for each, to the end of the run."""

    @abstractmethod
    def backward(self, batches: Sequence[Any], step: int) -> Outcome:
        """Leave the gradient of a step in the parameters, averaged over the processes, and return what came of it.

        Args:
            batches: `pieces` of those that `batches` yields.
            step: Steps done before this one.

        Raises:
            DeviceFull: On all processes; the step is tried again after `shrink`.
            InputError: No readable image where one was needed.
        """

    @abstractmethod
    def loss_of(self, outcome: Outcome) -> torch.Tensor:
        """Return the loss of a step, a scalar on the device: reading it would wait for the device."""

    @abstractmethod
    def record(self, outcome: Outcome) -> dict[str, float]:
        """Return what the log says of a step beside what it says of every one; every process calls."""

    def describe(self, record: dict[str, float]) -> str:
        """Return what is shown beside the progress."""
        return f"loss {record['loss']:.3f} {speed(record)}"

    def clip(self, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip the gradient; return its norm from before, and that of what is judged but not clipped, as scalars."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        return norm, torch.zeros_like(norm)

    def shrink(self, reason: str, step: int) -> None:
        """Take less memory from now on, on every process.

        Raises:
            InputError: There is no smaller form.
        """
        raise InputError(
            "`batch_size`: expected a step to fit into the device's memory, it does not: "
            f"{' '.join(reason.split())[:200]}; lower it."
        )

    def train_mode(self) -> None:
        """Put the model into training mode, but not what is frozen: that neither drops paths nor moves statistics."""
        self.model.train()
        for module in self.model.modules():
            parameters = list(module.parameters())
            if parameters and not any(one.requires_grad for one in parameters):
                module.eval()

    def end(self) -> None:
        """Take note that the optimiser has changed the weights."""
        if self.average is not None:
            self.average.update()

    def resumed(self, state: RunState) -> None:
        """Take over from a checkpoint's state the order of images, and what the step counts itself."""
        self.order = state.order

    def before_checkpoint(self, state: RunState) -> None:
        """Note in the state what the step counts itself; every process calls."""


def learning_rates(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set every group's learning rate to its `scale`, 1 without one, times the given one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("scale", 1.0)


def short(part: str) -> str:
    """Return the name of a part of the loss for the line of progress: five letters of each word."""
    return "_".join(word[:5] for word in part.split("_"))


def speed(record: dict[str, float]) -> str:
    """Return the speed that a line of the log has: images, and FLOPs where they were counted."""
    found = f"{record['images_per_second']:.0f} img/s"
    if "flops_per_second" in record:
        found += f" {in_flops(record['flops_per_second'])}/s"
    return found + (f" ({record['mfu']:.0%} of the peak)" if "mfu" in record else "")
