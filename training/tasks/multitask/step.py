"""One step of several tasks: which share of it each has, its images, and the gradient of all losses together."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.tasks.arguments import MultitaskArguments
from hf_vicreg.training.tasks.classification.data import PairedSampler
from hf_vicreg.training.tasks.multitask.model import LOG_VARIANCES, MultitaskModel
from hf_vicreg.training.tasks.prepared import PreparedTask
from hf_vicreg.training.tasks.training import UNREADABLE, TaskStep, scaled_groups

# s moves by about its learning rate a step: with that of weights it would stay where it is for thousands of steps
LOG_VARIANCES_SCALE = 20.0


def batch_shares(sizes: Mapping[str, int], batch_size: int, temperature: float, num_processes: int) -> dict[str, int]:
    """Return how many images of a step each task has: in proportion to size^(1 / temperature), at least one a process.

    Source: Raffel et al. 2019, T5 (arXiv 1910.10683), section 3.5.2, temperature-scaled mixing. There tasks are drawn;
    here each step has its share of every task, so all losses are there to be weighed. Whole numbers go to the largest
    remainders; no share is larger than its task.

    Args:
        sizes: Training images of each task.
        batch_size: Images a step over all processes.
        temperature: 1 is in proportion to size, and what is large makes shares equal.
        num_processes: Each share is a multiple of it.

    Raises:
        InputError: Too small a batch, or a task of fewer images than processes.
    """
    small = next((name for name, size in sizes.items() if size < num_processes), None)
    if small is not None:
        raise InputError(
            f"`{small}.train_split`: expected an image for each of {num_processes} processes, got {sizes[small]}."
        )
    if batch_size < num_processes * len(sizes):
        raise InputError(
            f"`batch_size`: expected at least {num_processes * len(sizes)}, an image of each of {len(sizes)} tasks on "
            f"each of {num_processes} processes, got {batch_size}."
        )
    units = batch_size // num_processes
    largest = max(sizes.values())
    rates = {name: (size / largest) ** (1 / temperature) for name, size in sizes.items()}
    wanted = {name: units * rate / sum(rates.values()) for name, rate in rates.items()}
    shares = {name: max(1, int(one)) for name, one in wanted.items()}
    # the least that is missing from, or too much in, the sum goes to and comes from those furthest from their wish
    while sum(shares.values()) < units:
        shares[max(shares, key=lambda name: wanted[name] - shares[name])] += 1
    while sum(shares.values()) > units:
        shares[max((name for name in shares if shares[name] > 1), key=lambda name: shares[name] - wanted[name])] -= 1
    return {name: min(one, sizes[name] // num_processes) * num_processes for name, one in shares.items()}


class MixedViews(Dataset):
    """Samples of several data sets, for (task, epoch, index)."""

    def __init__(self, datasets: dict[str, Dataset]):
        self.datasets = datasets

    def __getitem__(self, key: tuple[str, int, int]) -> tuple[str, Any]:
        """Return the task and its sample."""
        name, *place = key
        return name, self.datasets[name][tuple(place)]


def collate(parts: Mapping[str, Any], samples: Sequence[tuple[str, Any]]) -> dict[str, Any] | None:
    """Return each task's batch by its name, made by `parts`; None if one of them could not be made."""
    batches = {name: part([one for owner, one in samples if owner == name]) for name, part in parts.items()}
    return None if any(one is None for one in batches.values()) else batches


class MultitaskStep(TaskStep):
    """A step on images of every task, each with its own model over the shared encoder."""

    def __init__(
        self,
        model: MultitaskModel,
        tasks: dict[str, PreparedTask],
        shares: dict[str, int],
        settings: MultitaskArguments,
        accelerator: Accelerator,
        *,
        num_images: int,
    ):
        """Set up optimiser and data order.

        Args:
            model: Of the tasks' models.
            tasks: By their names.
            shares: Of `batch_shares`; those of tasks that are left out count for the number of steps.
            settings: The flags.
            accelerator: Processes and device.
            num_images: Of an epoch, over all tasks that have a share.
        """
        self.tasks, self.shares = tasks, shares
        scale_of = partial(_scale, tasks, settings.encoder_learning_rate_ratio)
        groups = scaled_groups(model, settings.weight_decay, scale_of)
        super().__init__(model, groups, settings, accelerator, num_images=num_images, batch_size=sum(shares.values()))
        self.images_per_step = sum(shares[name] for name in tasks)

    def batches(self, first_step: int) -> DataLoader:
        """Return batches of all tasks; a task's images are those that it would see alone."""
        seed = self.settings.seed
        samplers = {
            name: self.sampler(task.num_images, self.shares[name], seed, first_step)
            for name, task in self.tasks.items()
        }
        views = MixedViews({name: task.dataset for name, task in self.tasks.items()})
        parts = {name: task.collate for name, task in self.tasks.items()}
        return self.loader(views, PairedSampler(samplers), partial(collate, parts), seed)

    def backward(self, batches: Sequence[dict[str, Any] | None], step: int) -> dict[str, torch.Tensor]:
        """The gradient of all tasks' losses; see `TrainingStep`."""
        (batch,) = batches
        if batch is None:
            raise InputError(UNREADABLE)
        device = self.accelerator.device
        loss, losses = self.wrapped({name: task.inputs_of(batch[name], device) for name, task in self.tasks.items()})
        weights = self.model.present_weights()
        self.accelerator.backward(loss)
        parts = {f"{name}.loss": one.detach() for name, one in losses.items()}
        return {"loss": loss.detach()} | parts | {f"{name}.weight": one for name, one in weights.items()}


def _scale(tasks: Mapping[str, PreparedTask], encoder_ratio: float, parameter: str) -> float:
    """Return the factor on the learning rate of a parameter of a `MultitaskModel`, by its name."""
    if parameter == LOG_VARIANCES:
        return LOG_VARIANCES_SCALE
    part, _, inner = parameter.partition(".")
    if part == "encoder":
        return encoder_ratio
    task, _, own = inner.partition(".")
    return tasks[task].scale_of(own)
