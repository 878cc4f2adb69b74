"""Fine-tuning of a task model, detector or captioner: one step is batch, loss, backward, guard, update."""

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from hf_vicreg.training.engine.checkpoint import RunState
from hf_vicreg.training.engine.guard import MAX_SKIPPED_IN_A_ROW, StepGuard, Verdict
from hf_vicreg.training.engine.optim import learning_rate_at, parameter_groups
from hf_vicreg.training.engine.resume import checkpoint_together, resume_from
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.order import StepSampler
from hf_vicreg.training.launch.distributed import largest
from hf_vicreg.training.monitor.progress import Progress
from hf_vicreg.training.monitor.run_log import LOG_FILE, read_log, truncate_log
from hf_vicreg.training.tasks.arguments import TaskArguments

logger = logging.getLogger(__name__)


class TaskTrainer:
    """Fine-tunes one model whose forward pass returns the loss, from wherever its checkpoint left it."""

    def __init__(
        self,
        model: PreTrainedModel,
        dataset: Dataset,
        num_images: int,
        collate: Callable[[list[Any]], dict[str, Any] | None],
        inputs_of: Callable[[dict[str, Any], torch.device], dict[str, Any]],
        scale_of: Callable[[str], float],
        settings: TaskArguments,
        accelerator: Accelerator,
        state: RunState,
        measure: Callable[[], dict[str, float]],
        loss_scale: float = 1.0,
    ):
        """Set up optimiser and data order.

        Args:
            model: Takes what `inputs_of` returns, and returns a `loss`.
            dataset: Samples for (epoch, index).
            num_images: How many indices there are.
            collate: Makes a batch of samples, None if one of them could not be read.
            inputs_of: Moves a batch to the device, ready for the model.
            scale_of: Factor on the learning rate of a parameter, by its name; 0 freezes it.
            settings: The flags.
            accelerator: Processes and device.
            state: With the configuration and the data's fingerprint, at step 0.
            measure: Called on every process every `eval_steps`; what it returns is logged.
            loss_scale: Factor on the model's loss.

        Raises:
            InputError: A batch that the processes cannot share.
        """
        self.dataset, self.num_images, self.collate, self.inputs_of = dataset, num_images, collate, inputs_of
        self.settings, self.accelerator, self.state, self.measure = settings, accelerator, state, measure
        self.folder, self.loss_scale = Path(settings.output_dir), loss_scale
        processes = accelerator.num_processes
        self.batch_size = min(settings.batch_size, num_images) // processes * processes
        if self.batch_size == 0:
            raise InputError(f"`batch_size`: expected an image for each of {processes} processes, got fewer.")
        if self.batch_size < settings.batch_size:
            logger.info(
                "batch of %d instead of %d images: there are %d", self.batch_size, settings.batch_size, num_images
            )
        self.steps_per_epoch = num_images // self.batch_size
        self.num_steps = settings.max_steps or settings.num_train_epochs * self.steps_per_epoch
        optimizer = torch.optim.AdamW(scaled_groups(model, settings.weight_decay, scale_of), lr=settings.learning_rate)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.unwrapped: PreTrainedModel = accelerator.unwrap_model(self.model)
        self.guard = StepGuard(self.unwrapped, MAX_SKIPPED_IN_A_ROW)

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            InputError: It belongs to another configuration or other data.
        """
        self.state = resume_from(
            checkpoint, self.state, self.unwrapped, self.optimizer.optimizer, self.accelerator, self.num_steps
        )

    def fit(self) -> None:
        """Train to the last step; every process must call.

        Raises:
            InputError: No readable image where one was needed, or a gradient that is not finite many times in a row.
        """
        state, settings = self.state, self.settings
        if self.accelerator.is_main_process:
            truncate_log(self.folder / LOG_FILE, state.step)
        self._train_mode()
        progress = Progress(self.num_steps, state.step, shown=self.accelerator.is_local_main_process)
        seconds_before, started = state.training_seconds, time.perf_counter()
        for batch in self._loader(state.step):
            if batch is None:
                raise InputError(
                    "`train_split`: expected readable images, found too many corrupt ones in a row; check them."
                )
            record = self._step(batch)
            state.step += 1
            last = state.step == self.num_steps
            progress.describe(f"loss {record['loss']:.3f}")
            progress.update(state.step)
            if state.step % settings.logging_steps == 0 or last:
                self.log(record)
            if settings.eval_steps and state.step % settings.eval_steps == 0 and not last:
                pause = time.perf_counter()
                found = self.measure()
                self._train_mode()
                self.log(found)
                progress.write(f"step {state.step}: " + ", ".join(f"{key} {one:.3f}" for key, one in found.items()))
                started += time.perf_counter() - pause
            state.training_seconds = seconds_before + time.perf_counter() - started
            if state.step % settings.checkpointing_steps == 0 or last:
                self._checkpoint()
        progress.close()

    def _train_mode(self) -> None:
        """Put the model into training mode, but not what is frozen: that neither drops paths nor moves statistics."""
        self.model.train()
        for module in self.unwrapped.modules():
            parameters = list(module.parameters())
            if parameters and not any(one.requires_grad for one in parameters):
                module.eval()

    def log(self, record: dict[str, float]) -> None:
        """Add a line about the present step to the log."""
        if self.accelerator.is_main_process:
            where = {"step": self.state.step, "epoch": self.state.step / self.steps_per_epoch}
            with (self.folder / LOG_FILE).open("a") as file:
                file.write(json.dumps(where | record) + "\n")

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) for each line of the log that has `key`."""
        return [(record["step"], record[key]) for record in read_log(self.folder / LOG_FILE) if key in record]

    def _loader(self, first_step: int) -> DataLoader:
        accelerator, seed = self.accelerator, self.settings.seed
        return DataLoader(
            self.dataset,
            batch_sampler=StepSampler(
                self.num_images,
                self.batch_size,
                seed,
                first_step,
                self.num_steps,
                accelerator.process_index,
                accelerator.num_processes,
            ),
            num_workers=self.settings.dataloader_num_workers,
            collate_fn=self.collate,
            # its own generator: the loader draws a seed when it starts, which would shift a resumed run's randomness
            generator=torch.Generator().manual_seed(seed),
            pin_memory=accelerator.device.type == "cuda",
        )

    def _step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One optimiser step; returns what the log says of it."""
        settings = self.settings
        learning_rate = learning_rate_at(
            self.state.step, self.num_steps, settings.learning_rate, settings.warmup_ratio
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["scale"]
        self.guard.begin()
        loss = self.loss_scale * self.model(**self.inputs_of(batch, self.accelerator.device)).loss
        self.accelerator.backward(loss)
        limit = settings.max_grad_norm or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.unwrapped.parameters(), limit).item()
        (verdict,) = largest([self.guard.judge(loss.item(), grad_norm)], self.accelerator)
        if self.guard.allows(Verdict(verdict), self.state, settings.learning_rate):
            self.optimizer.step()
        self.model.zero_grad()
        return {"loss": loss.item(), "grad_norm": grad_norm, "learning_rate": learning_rate}

    def _checkpoint(self) -> None:
        checkpoint_together(
            self.folder / "checkpoints",
            self.state,
            self.unwrapped,
            self.optimizer.optimizer,
            self.settings.checkpoints_total_limit,
            self.accelerator,
        )


def scaled_groups(
    model: PreTrainedModel, weight_decay: float, scale_of: Callable[[str], float]
) -> list[dict[str, Any]]:
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
