"""Fine-tuning of a classifier: one step is batch, views, loss, backward, guard, update."""

import json
import logging
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedModel

from hf_vicreg.training.engine.checkpoint import RunState
from hf_vicreg.training.engine.guard import MAX_SKIPPED_IN_A_ROW, StepGuard, Verdict
from hf_vicreg.training.engine.optim import learning_rate_at
from hf_vicreg.training.engine.resume import checkpoint_together, resume_from
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import TuningArguments
from hf_vicreg.training.evaluation.features import encoded_batches
from hf_vicreg.training.images.order import StepSampler
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.launch.distributed import largest
from hf_vicreg.training.monitor.progress import Progress
from hf_vicreg.training.monitor.run_log import truncate_log
from hf_vicreg.training.tasks.classification.consistency import (
    annealed_cross_entropy,
    annealing_threshold,
    consistency_loss,
)
from hf_vicreg.training.tasks.classification.data import (
    LABELLED,
    UNLABELLED,
    ClassifierImages,
    PairedSampler,
    collate,
    image_size_of,
    pixel_values,
)
from hf_vicreg.training.tasks.classification.layer_decay import decayed_groups

logger = logging.getLogger(__name__)

BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Keeping:
    """Where and how often a fine-tuning leaves its traces.

    Attributes:
        folder: Of `log.jsonl` and `checkpoints`.
        logging_steps: Steps between lines of the log.
        checkpointing_steps: Steps between checkpoints.
        checkpoints_total_limit: Newest checkpoints to keep.
    """

    folder: Path
    logging_steps: int
    checkpointing_steps: int
    checkpoints_total_limit: int


class ClassifierTrainer:
    """Fine-tunes one classifier to its end."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        settings: TuningArguments,
        sources: dict[str, ImageSource],
        accelerator: Accelerator,
        state: RunState,
        *,
        seed: int,
        keeping: Keeping | None = None,
    ):
        """Set up optimiser and data order.

        Args:
            model: Any image classifier of transformers.
            processor: Its image processor.
            settings: The flags of fine-tuning.
            sources: `labelled` images and, for the consistency loss, `unlabelled` ones.
            accelerator: Processes and device.
            state: With the configuration and the data's fingerprint, at step 0.
            seed: Of order and augmentation.
            keeping: Log and checkpoints; None leaves nothing on the disk.

        Raises:
            InputError: A batch that the processes cannot share.
        """
        self.settings, self.processor, self.sources, self.seed = settings, processor, sources, seed
        self.accelerator, self.state, self.keeping = accelerator, state, keeping
        processes = accelerator.num_processes
        wanted = {LABELLED: settings.batch_size, UNLABELLED: settings.unlabelled_batch_size}
        # few labels fill no large batch
        self.batch_sizes = {
            kind: min(wanted[kind], len(source)) // processes * processes for kind, source in sources.items()
        }
        for kind, size in self.batch_sizes.items():
            if size == 0:
                raise InputError(
                    f"`batch_size`: expected a {kind} image for each of {processes} processes, got fewer."
                )
            if size < wanted[kind]:
                logger.info(
                    "batch of %d instead of %d %s images: there are %d", size, wanted[kind], kind, len(sources[kind])
                )
        steps_per_epoch = len(sources[LABELLED]) // self.batch_sizes[LABELLED]
        self.num_steps = settings.max_steps or settings.num_train_epochs * steps_per_epoch
        self.steps_per_epoch = steps_per_epoch
        self.num_classes = model.config.num_labels
        if settings.freeze_encoder:
            model.base_model.requires_grad_(False)
        groups = decayed_groups(model, settings.weight_decay, settings.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS)
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
        state, keeping = self.state, self.keeping
        if keeping is not None and self.accelerator.is_main_process:
            truncate_log(keeping.folder / "log.jsonl", state.step)
        self.model.train()
        if self.settings.freeze_encoder:
            self.unwrapped.base_model.eval()
        progress = Progress(self.num_steps, state.step, shown=self.accelerator.is_local_main_process)
        seconds_before, started = state.training_seconds, time.perf_counter()
        for batch in self._loader(state.step):
            if not all(kind in batch for kind in self.sources):
                raise InputError(
                    "`train_split`: expected readable images, found too many corrupt ones in a row; check them."
                )
            record = self._step(batch)
            state.step += 1
            last = state.step == self.num_steps
            progress.describe(f"loss {record['loss']:.3f}")
            progress.update(state.step)
            state.training_seconds = seconds_before + time.perf_counter() - started
            if keeping is None:
                continue
            if self.accelerator.is_main_process and (state.step % keeping.logging_steps == 0 or last):
                with (keeping.folder / "log.jsonl").open("a") as file:
                    file.write(
                        json.dumps({"step": state.step, "epoch": state.step / self.steps_per_epoch} | record) + "\n"
                    )
            if state.step % keeping.checkpointing_steps == 0 or last:
                checkpoint_together(
                    keeping.folder / "checkpoints",
                    state,
                    self.unwrapped,
                    self.optimizer.optimizer,
                    keeping.checkpoints_total_limit,
                    self.accelerator,
                )
        progress.close()

    def predict(self, source: ImageSource, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return predicted and true classes `(readable images,)` int64; every process must call."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        labels, predictions = [], []
        assert source.labels is not None
        self.unwrapped.eval()
        for _, indices, logits in encoded_batches(
            source,
            self.processor,
            lambda pixels: self.unwrapped(pixel_values=pixels.to(self.accelerator.device)).logits,
            share=(rank, processes),
            batch_size=batch_size,
        ):
            predictions += logits.argmax(1).tolist()
            labels += [source.labels[index] for index in indices]
        pairs = list(zip(predictions, labels, strict=True))
        if processes > 1:
            pairs = gather_object(pairs)
        if not pairs:
            raise InputError(f"`test_split`: expected readable images in {source.name}, all are corrupt; check them.")
        found = torch.tensor(pairs, dtype=torch.int64)
        return found[:, 0], found[:, 1]

    def _loader(self, first_step: int) -> DataLoader:
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        samplers = {
            kind: StepSampler(
                len(source), self.batch_sizes[kind], self.seed, first_step, self.num_steps, rank, processes
            )
            for kind, source in self.sources.items()
        }
        return DataLoader(
            ClassifierImages(self.sources, self.settings, image_size_of(self.processor), self.seed),
            batch_sampler=PairedSampler(samplers),
            num_workers=self.settings.dataloader_num_workers,
            collate_fn=collate,
            # its own generator: the loader draws a seed when it starts, which would shift a resumed run's randomness
            generator=torch.Generator().manual_seed(self.seed),
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One optimiser step; returns what the log says of it."""
        settings, accelerator = self.settings, self.accelerator
        learning_rate = learning_rate_at(
            self.state.step, self.num_steps, settings.learning_rate, settings.warmup_ratio
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["scale"]
        self.guard.begin()
        labels = batch[LABELLED]["labels"].to(accelerator.device)
        images = pixel_values(batch[LABELLED], self.processor, accelerator.device)[:, 0]
        if UNLABELLED in self.sources:
            loss, parts = self._consistency_loss(images, labels, batch)
        else:
            loss, parts = self._supervised_loss(images, labels), {}
        accelerator.backward(loss)
        limit = settings.max_grad_norm or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.unwrapped.parameters(), limit).item()
        (verdict,) = largest([self.guard.judge(loss.item(), grad_norm)], accelerator)
        if self.guard.allows(Verdict(verdict), self.state, settings.learning_rate):
            self.optimizer.step()
        self.model.zero_grad()
        return {"loss": loss.item(), **parts, "grad_norm": grad_norm, "learning_rate": learning_rate}

    def _supervised_loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, of pairs of images where they are mixed.

        Source: Zhang et al. 2017, mixup (arXiv 1710.09412): one share a batch, its images mixed with their neighbours.
        """
        alpha = self.settings.mixup_alpha
        if not alpha:
            return F.cross_entropy(self.model(pixel_values=images).logits.float(), labels)
        share = random.Random(f"{self.seed}/{self.state.step}/mixup").betavariate(alpha, alpha)
        logits = self.model(pixel_values=share * images + (1 - share) * images.roll(1, 0)).logits.float()
        return share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels.roll(1, 0))

    def _consistency_loss(
        self, images: torch.Tensor, labels: torch.Tensor, batch: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Annealed cross-entropy and consistency, and their readings; see `consistency.py`."""
        settings, accelerator = self.settings, self.accelerator
        weak, strong = pixel_values(batch[UNLABELLED], self.processor, accelerator.device).unbind(1)
        with torch.no_grad():
            weak_logits = self.unwrapped(pixel_values=weak).logits
        logits = self.model(pixel_values=torch.cat([images, strong])).logits
        threshold = annealing_threshold(settings.annealing, self.state.step, self.num_steps, self.num_classes)
        total, counted = annealed_cross_entropy(logits[: len(images)], labels, threshold)
        # the mean over all processes' images that count: gradients are averaged over the processes afterwards
        everywhere = accelerator.reduce(counted.float(), "sum").clamp(min=1)
        supervised = total * accelerator.num_processes / everywhere
        consistency, confident = consistency_loss(
            logits[len(images) :],
            weak_logits,
            confidence_threshold=settings.confidence_threshold,
            sharpening_temperature=settings.sharpening_temperature,
        )
        parts = {
            "supervised_loss": supervised.item(),
            "consistency_loss": consistency.item(),
            "confident_ratio": confident.item(),
            "counted_ratio": counted.item() / len(images),
        }
        return supervised + settings.consistency_weight * consistency, parts
