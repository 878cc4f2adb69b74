"""A task's model and data, ready for a step: what the fine-tuning of one task and that of many begin with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BaseImageProcessor, PreTrainedModel


@dataclass(frozen=True)
class PreparedTask:
    """A model whose forward pass returns its `loss`, and what it is trained and tested on.

    Attributes:
        model: To fine-tune.
        processor: Its image processor.
        train: The training split.
        test: The test split.
        dataset: Training samples for (epoch, index), an index for each image of the training split.
        collate: Makes a batch of samples, None if one of them could not be read.
        inputs_of: Moves a batch to the device, ready for the model.
        scale_of: Factor on the learning rate of a parameter, by its name; 0 freezes it.
        measure: Figures of the test images; every process must call.
        weights: Hash of the model before it has seen an image.
        loss_scale: Factor on the model's loss.
        finish: Called once when training is over.
        companions: What is saved beside model and processor.
        facts: What `results.json` says of the data beside what it says of all.
    """

    model: PreTrainedModel
    processor: BaseImageProcessor
    train: Any
    test: Any
    dataset: Dataset
    collate: Callable[[list[Any]], dict[str, Any] | None]
    inputs_of: Callable[[dict[str, Any], torch.device], dict[str, Any]]
    scale_of: Callable[[str], float]
    measure: Callable[[], dict[str, float]]
    weights: str
    loss_scale: float = 1.0
    finish: Callable[[], None] = lambda: None
    companions: tuple[Any, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """Of the training split."""
        return len(self.train.source)
