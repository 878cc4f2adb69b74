"""Fine-tuning of a classifier: the step, with mixed images or with a consistency loss, and what it predicts."""

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedModel

from hf_vicreg.training.engine.encoders import add_adapters
from hf_vicreg.training.engine.optim import decayed_groups
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import TuningArguments
from hf_vicreg.training.evaluation.features import encoded_batches
from hf_vicreg.training.images.sources import ImageSource
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
    check_pixels,
    collate,
    image_size_of,
    pixel_values,
)
from hf_vicreg.training.tasks.training import UNREADABLE, TaskStep, fitting_batch


class ClassifierStep(TaskStep):
    """Fine-tuning of a classifier on labelled images and, for the consistency loss, unlabelled ones."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        settings: TuningArguments,
        sources: dict[str, ImageSource],
        accelerator: Accelerator,
        *,
        seed: int,
    ):
        """Set up optimiser and data order.

        Args:
            model: Any image classifier of transformers.
            processor: Its image processor.
            settings: The flags of fine-tuning.
            sources: `labelled` images and, for the consistency loss, `unlabelled` ones.
            accelerator: Processes and device.
            seed: Of order and augmentation.

        Raises:
            InputError: A batch that the processes cannot share, and what `check_pixels` refuses.
        """
        check_pixels(processor)
        self.processor, self.sources, self.seed = processor, sources, seed
        wanted = {LABELLED: settings.batch_size, UNLABELLED: settings.unlabelled_batch_size}
        # few labels fill no large batch
        self.batch_sizes = {
            kind: fitting_batch(wanted[kind], len(source), accelerator.num_processes, f"{kind} ")
            for kind, source in sources.items()
        }
        self.num_classes = model.config.num_labels
        if settings.freeze_encoder:
            model.base_model.requires_grad_(False)
        if settings.lora_rank:
            add_adapters(model.base_model, settings.lora_rank)
        groups = decayed_groups(model, settings.weight_decay, settings.layer_decay)
        size = self.batch_sizes[LABELLED]
        super().__init__(model, groups, settings, accelerator, num_images=len(sources[LABELLED]), batch_size=size)

    def batches(self, first_step: int) -> DataLoader:
        """Return batches of labelled images, each with one of unlabelled images where there are any."""
        samplers = {
            kind: self.sampler(len(source), self.batch_sizes[kind], self.seed, first_step)
            for kind, source in self.sources.items()
        }
        images = ClassifierImages(self.sources, self.settings, image_size_of(self.processor), self.seed)
        return self.loader(images, PairedSampler(samplers), collate, self.seed)

    def backward(self, batches: Sequence[dict[str, Any]], step: int) -> dict[str, torch.Tensor]:
        """The gradient of the supervised or of the consistency loss; see `TrainingStep`."""
        (batch,) = batches
        if not all(kind in batch for kind in self.sources):
            raise InputError(UNREADABLE)
        accelerator = self.accelerator
        labels = batch[LABELLED]["labels"].to(accelerator.device)
        images = pixel_values(batch[LABELLED], self.processor, accelerator.device)[:, 0]
        if UNLABELLED in self.sources:
            loss, parts = self._consistency_loss(images, labels, batch, step)
        else:
            loss, parts = self._supervised_loss(images, labels, step), {}
        accelerator.backward(loss)
        return {"loss": loss.detach(), **parts}

    def _supervised_loss(self, images: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        """Cross-entropy, of pairs of images where they are mixed.

        Source: Zhang et al. 2017, mixup (arXiv 1710.09412): one share a batch, its images mixed with their neighbours.
        """
        alpha = self.settings.mixup_alpha
        if not alpha:
            return F.cross_entropy(self.wrapped(pixel_values=images).logits.float(), labels)
        share = random.Random(f"{self.seed}/{step}/mixup").betavariate(alpha, alpha)
        logits = self.wrapped(pixel_values=share * images + (1 - share) * images.roll(1, 0)).logits.float()
        return share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels.roll(1, 0))

    def _consistency_loss(
        self, images: torch.Tensor, labels: torch.Tensor, batch: dict[str, Any], step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Annealed cross-entropy and consistency, and their readings; see `consistency.py`."""
        settings, accelerator = self.settings, self.accelerator
        weak, strong = pixel_values(batch[UNLABELLED], self.processor, accelerator.device).unbind(1)
        with torch.no_grad():
            weak_logits = self.model(pixel_values=weak).logits
        logits = self.wrapped(pixel_values=torch.cat([images, strong])).logits
        threshold = annealing_threshold(settings.annealing, step, self.num_steps, self.num_classes)
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
            "supervised_loss": supervised.detach(),
            "consistency_loss": consistency.detach(),
            "confident_ratio": confident,
            "counted_ratio": counted / len(images),
        }
        return supervised + settings.consistency_weight * consistency, parts

    def predict(self, source: ImageSource, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return predicted and true classes `(readable images,)` int64; every process must call."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        labels, predictions = [], []
        assert source.labels is not None
        self.model.eval()
        for _, indices, logits in encoded_batches(
            source,
            self.processor,
            lambda pixels: self.model(pixel_values=pixels.to(self.accelerator.device)).logits,
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
