"""A classifier's head on one class, several classes or numbers an image: prepared, and measured."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_processor, weights_digest
from hf_vicreg.training.evaluation.features import encoded_batches
from hf_vicreg.training.tasks.arguments import LabelArguments
from hf_vicreg.training.tasks.captioning.data import collate
from hf_vicreg.training.tasks.classification.data import check_pixels, image_size_of, pixel_values
from hf_vicreg.training.tasks.classification.model import build_classifier
from hf_vicreg.training.tasks.data import AnnotatedImages, TargetViews, read_for
from hf_vicreg.training.tasks.multitask.labels import load_classes, load_numbers, load_several_classes
from hf_vicreg.training.tasks.multitask.tasks_file import CLASSES, NUMBERS, SEVERAL
from hf_vicreg.training.tasks.prepared import PreparedTask

LOADERS = {CLASSES: load_classes, SEVERAL: load_several_classes, NUMBERS: load_numbers}


@dataclass
class Units:
    """Mean and deviation of a regression's targets: it learns how many deviations from the mean they are.

    Attributes:
        mean: `(outputs,)` float32; 0 where nothing is changed.
        deviation: `(outputs,)` float32, 1 there.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def standard(self, targets: torch.Tensor) -> torch.Tensor:
        """Return targets `(..., outputs)` as they are learned."""
        return (targets - self.mean.to(targets.device)) / self.deviation.to(targets.device)

    def natural(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return what the head gives, `(..., outputs)`, in the column's units."""
        return outputs * self.deviation + self.mean

    @torch.no_grad()
    def move_into(self, head: nn.Linear) -> None:
        """Let a head give numbers in the column's units by itself from now on."""
        deviation, mean = self.deviation.to(head.weight.device), self.mean.to(head.weight.device)
        head.weight.mul_(deviation[:, None])
        head.bias.mul_(deviation).add_(mean)
        self.mean, self.deviation = torch.zeros_like(self.mean), torch.ones_like(self.deviation)


def prepare_labels(model_name: str, kind: str, arguments: LabelArguments, accelerator: Accelerator) -> PreparedTask:
    """Return a classifier, of classes or with numbers in their place, and its data, ready for a step.

    transformers' words for the kinds are `problem_type`s: cross-entropy, binary cross-entropies, squared error.

    Raises:
        InputError: No such data or model.
    """
    train, test, names = LOADERS[kind](arguments)
    model = build_classifier(model_name, names, from_scratch=False, seed=arguments.seed)
    model.config.problem_type = f"single_label_{kind}" if kind == CLASSES else kind
    processor = load_processor(model_name, model.config)
    check_pixels(processor)
    train, test = read_for(processor, train), read_for(processor, test)
    units = Units(torch.zeros(len(names)), torch.ones(len(names)))
    if kind == NUMBERS:
        targets = torch.stack(train.annotations)
        units = Units(targets.mean(0), targets.std(0, correction=0))
    tester = LabelTester(model, processor, test, kind, units, accelerator, arguments.per_device_eval_batch_size)
    return PreparedTask(
        model,
        processor,
        train,
        test,
        TargetViews(train.source, train.annotations, image_size_of(processor), arguments),
        collate,  # labels of one length: it pads nothing
        partial(model_inputs, processor, kind, units),
        lambda name: 1.0,
        tester.measure,
        weights_digest(model),
        finish=tester.finish,
        facts={"label_column": arguments.label_column_name}
        | ({"outputs": names} if kind == NUMBERS else {"num_classes": len(names), "class_names": names}),
    )


def model_inputs(
    processor: BaseImageProcessor, kind: str, units: Units, batch: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Return what a classifier takes of a batch, on the device."""
    labels = batch["labels"].to(device)
    labels = labels[:, 0] if kind == CLASSES else units.standard(labels) if kind == NUMBERS else labels
    return {"pixel_values": pixel_values(batch, processor, device)[:, 0], "labels": labels}


class LabelTester:
    """Compares what a head says of the test images with their labels, an equal share on each process."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        images: AnnotatedImages,
        kind: str,
        units: Units,
        accelerator: Accelerator,
        batch_size: int,
    ):
        """Take what is measured, and how."""
        self.model, self.processor, self.images, self.kind, self.units = model, processor, images, kind, units
        self.accelerator, self.batch_size = accelerator, batch_size

    def finish(self) -> None:
        """Put a regression's units into its head."""
        self.units.move_into(self.model.classifier)

    def measure(self) -> dict[str, float]:
        """Return figures of the readable test images; every process must call.

        Of one class `accuracy`. Of several `exact_match`, the share of images with all of them right, and `f1`, over
        all pairs of image and class; a class is found where it is likelier than not. Of numbers `mae`, the mean error
        in the column's units, and `r2`, the share of their variance that is explained, both means over the outputs.

        Raises:
            InputError: Not one image can be read.
        """
        found: list[tuple[int, list[float]]] = []
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.model.eval()
        for _, indices, logits in encoded_batches(
            self.images.source,
            self.processor,
            lambda pixels: self.model(pixel_values=pixels.to(self.accelerator.device)).logits,
            share=(rank, processes),
            batch_size=self.batch_size,
        ):
            found += zip(indices, logits.tolist(), strict=True)
        if processes > 1:
            found = gather_object(found)
        if not found:
            raise InputError(
                f"`test_split`: expected readable images in {self.images.split!r}, all are corrupt; check them."
            )
        outputs = torch.tensor([logits for _, logits in sorted(found)])
        truth = torch.stack([self.images.annotations[index] for index, _ in sorted(found)])
        return measured(self.kind, self.units.natural(outputs), truth)


def measured(kind: str, outputs: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Return the figures of `LabelTester.measure`.

    Args:
        kind: Of the task.
        outputs: `(images, outputs)`: logits, or numbers in the column's units.
        truth: `(images, 1)` int64 classes, or `(images, outputs)` float32.
    """
    if kind == CLASSES:
        return {"accuracy": (outputs.argmax(1) == truth[:, 0]).double().mean().item()}
    if kind == SEVERAL:
        said = outputs > 0
        right = (said & (truth > 0)).sum().item()
        return {
            "f1": 2 * right / max(1, said.sum().item() + truth.sum().item()),
            "exact_match": (said == (truth > 0)).all(1).double().mean().item(),
        }
    outputs, truth = outputs.double(), truth.double()
    errors, spread = (outputs - truth).square().sum(0), (truth - truth.mean(0)).square().sum(0)
    figures = {"mae": (outputs - truth).abs().mean().item()}
    if bool((spread > 0).all()):  # else there is nothing to explain
        figures["r2"] = (1 - errors / spread).mean().item()
    return figures
