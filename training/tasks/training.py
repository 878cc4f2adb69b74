"""The step that fine-tunes a task's model, and the flow that every fine-tuning follows around the engine's loop."""

import json
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import BaseImageProcessor, PreTrainedModel

from hf_vicreg.training.engine.checkpoint import RunState
from hf_vicreg.training.engine.encoders import ADAPTER, merge_adapters
from hf_vicreg.training.engine.loop import LoopSettings, TrainingLoop
from hf_vicreg.training.engine.optim import parameter_groups
from hf_vicreg.training.engine.resume import checkpoint_to_resume
from hf_vicreg.training.engine.step import TrainingStep
from hf_vicreg.training.errors import InputError, room_in
from hf_vicreg.training.evaluation.encoder import public_name, quiet_transformers, weights_digest
from hf_vicreg.training.evaluation.results import add_evaluation, evaluation_record
from hf_vicreg.training.images.order import StepSampler
from hf_vicreg.training.launch.signals import StopRequest, outlive_signals
from hf_vicreg.training.run.run_folder import alone_in, start_folder
from hf_vicreg.training.tasks.arguments import OWN_FILE, TaskArguments
from hf_vicreg.training.tasks.prepared import PreparedTask

logger = logging.getLogger(__name__)

UNREADABLE = "`train_split`: expected readable images, found too many corrupt ones in a row; check them."


def fitting_batch(wanted: int, num_images: int, num_processes: int, kind: str = "") -> int:
    """Return the batch size, smaller where there are few images, a multiple of the processes.

    Raises:
        InputError: Fewer images than processes.
    """
    size = min(wanted, num_images) // num_processes * num_processes
    if size == 0:
        raise InputError(f"`batch_size`: expected a {kind}image for each of {num_processes} processes, got fewer.")
    if size < wanted:
        logger.info("batch of %d instead of %d %simages: there are %d", size, wanted, kind, num_images)
    return size


class TaskStep(TrainingStep[dict[str, torch.Tensor]]):
    """Fine-tuning by AdamW; what comes of a step is what the log says of it, scalars, its `loss` among them.

    Attributes:
        wrapped: The model as accelerate prepared it, which averages gradients over the processes.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        settings: Any,
        accelerator: Accelerator,
        *,
        num_images: int,
        batch_size: int,
    ):
        """Set up the optimiser.

        Args:
            model: To fine-tune.
            groups: Of its parameters, each with a `scale`.
            settings: Flags with `learning_rate`, `max_steps`, `num_train_epochs` and `dataloader_num_workers`.
            accelerator: Processes and device.
            num_images: Of an epoch.
            batch_size: Over all processes.
        """
        self.settings, self.accelerator = settings, accelerator
        self.images_per_step, self.steps_per_epoch = batch_size, num_images // batch_size
        self.num_steps = settings.max_steps or settings.num_train_epochs * self.steps_per_epoch
        self.wrapped, self.optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, lr=settings.learning_rate))
        self.model: Any = accelerator.unwrap_model(self.wrapped)

    @abstractmethod
    def backward(self, batches: Sequence[Any], step: int) -> dict[str, torch.Tensor]:
        """See `TrainingStep`."""

    def loss_of(self, outcome: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss."""
        return outcome["loss"]

    def record(self, outcome: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return all that came of the step."""
        return {name: one.item() for name, one in outcome.items()}

    def loader(self, dataset: Dataset, sampler: Iterable[Any] | Sampler, collate: Callable, seed: int) -> DataLoader:
        """Return a loader of the sampler's batches."""
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.settings.dataloader_num_workers,
            collate_fn=collate,
            # its own generator: the loader draws a seed when it starts, which would shift a resumed run's randomness
            generator=torch.Generator().manual_seed(seed),
            worker_init_fn=outlive_signals,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def sampler(self, num_images: int, batch_size: int, seed: int, first_step: int) -> StepSampler:
        """Return this process's share of every step's images."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return StepSampler(num_images, batch_size, seed, first_step, self.num_steps, rank, processes, order=self.order)


class ModelLossStep(TaskStep):
    """Fine-tuning of a model whose forward pass returns its loss, a detector or a captioner."""

    def __init__(self, task: PreparedTask, settings: TaskArguments, accelerator: Accelerator):
        """Set up optimiser and data order.

        Raises:
            InputError: A batch that the processes cannot share.
        """
        self.task = task
        batch_size = fitting_batch(settings.batch_size, task.num_images, accelerator.num_processes)
        groups = scaled_groups(task.model, settings.weight_decay, task.scale_of)
        super().__init__(task.model, groups, settings, accelerator, num_images=task.num_images, batch_size=batch_size)

    def batches(self, first_step: int) -> DataLoader:
        """Return batches of training images."""
        seed = self.settings.seed
        sampler = self.sampler(self.task.num_images, self.images_per_step, seed, first_step)
        return self.loader(self.task.dataset, sampler, self.task.collate, seed)

    def backward(self, batches: Sequence[dict[str, Any] | None], step: int) -> dict[str, torch.Tensor]:
        """The gradient of the model's own loss; see `TrainingStep`."""
        (batch,) = batches
        if batch is None:
            raise InputError(UNREADABLE)
        loss = self.task.loss_scale * self.wrapped(**self.task.inputs_of(batch, self.accelerator.device)).loss
        self.accelerator.backward(loss)
        return {"loss": loss.detach()}


def tuning_loop(
    step: TaskStep,
    settings: Any,
    accelerator: Accelerator,
    recipe: dict[str, Any],
    fingerprint: str,
    folder: Path,
    measure: Callable[[], dict[str, float]] | None = None,
) -> TrainingLoop:
    """Return the loop of one fine-tuning, at its first step; see `TrainingLoop`.

    A resumed run has to agree with recipe and fingerprint; `measure` needs flags with `eval_steps`.
    """
    return TrainingLoop(
        step,
        LoopSettings.of(settings, measure_steps=settings.eval_steps or 0 if measure else 0),
        accelerator,
        RunState(recipe=recipe, data_fingerprint=fingerprint),
        folder=folder,
        measure=measure,
        stop=StopRequest(folder, None),
    )


def fine_tune(loop: TrainingLoop, settings: Any, model_name: str, recipe: dict[str, Any], images: str) -> None:
    """Train from wherever the folder's checkpoint left it to the end; every process must call.

    Args:
        loop: At its first step, with a folder and a request to stop.
        settings: Flags with `seed` and `resume_from_checkpoint`.
        model_name: What is fine-tuned.
        recipe: What a resumed run has to agree with.
        images: For the log, what is trained on.

    Raises:
        InputError: A checkpoint of another configuration, and what `TrainingLoop.fit` refuses.
        RunStopped: It was asked to stop and has written a checkpoint.
    """
    assert loop.folder is not None
    assert loop.stop is not None
    accelerator = loop.accelerator
    set_seed(settings.seed + accelerator.process_index)  # every process drops paths of its own
    checkpoint = checkpoint_to_resume(settings, accelerator)
    if checkpoint is not None:
        loop.resume(checkpoint)
    described = {"model": public_name(model_name)} | recipe
    with alone_in(loop.folder, accelerator), loop.stop:
        start_folder(loop.folder, OWN_FILE, json.dumps(described, indent=1) + "\n", accelerator)
        logger.info("%s, %d steps", images, loop.step.num_steps)
        loop.fit()
    with room_in(loop.folder):
        kept = loop.folder / ADAPTER if accelerator.is_main_process else None
        merge_adapters(loop.step.model, kept, public_name(model_name))


def tuned_record(
    task: str,
    loop: TrainingLoop,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    *,
    feature: str,
    data: dict[str, Any],
    settings: dict[str, Any],
    metrics: dict[str, float],
    details: dict[str, Any],
    pictures: Sequence[str],
    started: float,
) -> dict[str, Any]:
    """Return the entry of `results.json` for a fine-tuned model.

    Args:
        task: `finetune_...`.
        loop: At its end.
        model: The fine-tuned one.
        processor: Its image processor.
        feature: What the model gives.
        data: Of `describe_data`.
        settings: The flags that change a figure.
        metrics: What was measured.
        details: What stands behind it; what every fine-tuning says of its training is added.
        pictures: Files in the folder.
        started: When, by `time.perf_counter`.
    """
    assert loop.folder is not None
    state = loop.state
    return evaluation_record(
        task,
        {
            "name": loop.folder.resolve().name,
            "model_type": model.config.model_type,
            "parameters": sum(one.numel() for one in model.parameters()),
            "weights": weights_digest(model),
            "feature": feature,
            "preprocessing": json.loads(json.dumps(processor.to_dict(), sort_keys=True, default=str)),
        },
        data,
        settings,
        metrics,
        details=details
        | {
            "steps": state.step,
            "skipped_steps": state.skipped_steps,
            "training_seconds": round(state.training_seconds, 1),
            "processes": loop.accelerator.num_processes,
        },
        pictures=pictures,
        seconds=time.perf_counter() - started,
    )


def save_tuned(folder: Path, record: dict[str, Any], model: PreTrainedModel, *companions: Any) -> None:
    """Write a fine-tuned model, what goes with it, and its entry of `results.json`; on the main process."""
    with quiet_transformers():
        model.save_pretrained(folder)
    for companion in companions:
        companion.save_pretrained(folder)
    add_evaluation(folder, record)


def scaled_groups(model: nn.Module, weight_decay: float, scale_of: Callable[[str], float]) -> list[dict[str, Any]]:
    """Return AdamW's groups of `parameter_groups`, split by `scale`, the factor on the learning rate."""
    scales = {id(parameter): scale_of(name) for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        if scales[id(parameter)] == 0:
            parameter.requires_grad_(False)
    groups = []
    for group in parameter_groups(model, weight_decay):
        for scale in sorted({scales[id(parameter)] for parameter in group["params"]}):
            parameters = [parameter for parameter in group["params"] if scales[id(parameter)] == scale]
            groups.append(group | {"params": parameters, "scale": scale})
    return groups
