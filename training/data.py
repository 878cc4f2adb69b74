"""The order in which a run sees its images, and the batches it makes of them.

A `ViewDataset` turns (epoch, index) into two uint8 crops. A `StepSampler` says which images each step of each process
sees, as a function of the step alone: that, and randomness keyed on (seed, epoch, index, view), is why a resumed run
sees what it would have seen, with any number of workers and any number of processes that divides the batch.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from hf_vicreg.training.sources import ImageSource
from hf_vicreg.training.views import ViewSampler

MAX_SUBSTITUTES = 64


class ViewDataset(Dataset):
    """Two uint8 crops and their colour parameters for (epoch, index)."""

    def __init__(self, source: ImageSource, sampler: ViewSampler, seed: int):
        self.source = source
        self.sampler = sampler
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return `views` `(2, 3, size, size)` uint8, `colours` `(2, parameters)` float32 and `unusable` indices.

        An unusable image is replaced by another one drawn at random, the same in every run: batches keep their size.
        `views` is None when too many in a row are unusable.
        """
        epoch, wanted = key
        unusable: list[int] = []
        # drawn from everywhere: neighbours in a folder tend to be broken together
        substitutes = random.Random(f"{self.seed}/{epoch}/{wanted}/substitute")
        for attempt in range(MAX_SUBSTITUTES):
            index = substitutes.randrange(len(self.source)) if attempt else wanted
            image = self.source.read(index)
            if image is not None:
                drawn = [
                    self.sampler(image, random.Random(f"{self.seed}/{epoch}/{wanted}/{view}")) for view in range(2)
                ]
                views, colours = zip(*drawn, strict=True)
                return {"views": torch.stack(views), "colours": torch.tensor(colours), "unusable": unusable}
            unusable.append(index)
        return {"views": None, "colours": None, "unusable": unusable}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch: `views` `(batch, 2, 3, size, size)`, `colours` `(batch, 2, parameters)`, `unusable` a list."""
    unusable = [index for sample in samples for index in sample["unusable"]]
    if any(sample["views"] is None for sample in samples):
        return {"views": None, "colours": None, "unusable": unusable}
    return {
        "views": torch.stack([sample["views"] for sample in samples]),
        "colours": torch.stack([sample["colours"] for sample in samples]),
        "unusable": unusable,
    }


class StepSampler(Sampler):
    """Yields this process's (epoch, index) keys, step after step, from any step on.

    Every epoch is a new permutation that depends on (seed, epoch) alone; the last, short batch is dropped. Process r
    of W takes the r-th of W equal runs of each batch, so the batch is the same set of images whatever W is.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, first_step: int, num_steps: int, rank: int, world_size: int
    ):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.steps = range(first_step, num_steps)
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_images // self.batch_size
        order_epoch, order = -1, []
        for step in self.steps:
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, list(range(self.num_images))
                random.Random(f"{self.seed}/{epoch}").shuffle(order)
            batch = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield [(epoch, index) for index in batch[self.share]]
