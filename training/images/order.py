"""The order in which a run sees its images, and the batches it makes of them.

A `ViewDataset` turns (epoch, index) into uint8 crops. A `StepSampler` says which images each step of each process
sees, as a function of the step alone: that, and randomness keyed on (seed, epoch, index, view), is why a resumed run
sees what it would have seen, with any number of workers and any number of processes that divides the batch.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from hf_vicreg.training.images.decoding import UnusableImage
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.texts.captions import Captions

MAX_SUBSTITUTES = 64
ORDERS = KEYED, SHUFFLED = "keyed", "shuffled"  # of images: this version's, and that of checkpoints up to 0.1.0
FEISTEL_ROUNDS = 12


class ViewDataset(Dataset):
    """uint8 crops and their colour parameters for (epoch, index)."""

    def __init__(self, source: ImageSource, samplers: list[ViewSampler], seed: int):
        """Take a sampler for each view: two global ones, then the local ones."""
        self.source = source
        self.samplers = samplers
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return the views of one image.

        `views` `(2, 3, height, width)` uint8, `local_views` `(local views, 3, side, side)` uint8 if there are any,
        `colours` `(views, parameters)`, `geometry` `(views, 6)`, both float32, local ones last, `index` of the image,
        `unusable`, and `tokens`, one of the image's captions, where it has some. An unusable image is replaced by
        another one drawn at random, the same in every run: batches keep their size. `views` is None when too many in
        a row are unusable.
        """
        epoch, wanted = key
        unusable: list[int] = []
        # drawn from everywhere: neighbours in a folder tend to be broken together
        substitutes = random.Random(f"{self.seed}/{epoch}/{wanted}/substitute")
        for attempt in range(MAX_SUBSTITUTES):
            index = substitutes.randrange(len(self.source)) if attempt else wanted
            key_of_views = f"{self.seed}/{epoch}/{wanted}"
            image = self.source.read(index, partial(joint_reduction, self.samplers, key_of_views))
            if image is not None:
                try:
                    sample = draw_views(self.samplers, image, key_of_views) | {"unusable": unusable}
                    sample["index"] = torch.tensor(index)
                    captions = self.source.captions
                    if captions is not None:
                        sample["tokens"] = captions.draw(index, random.Random(f"{key_of_views}/caption"))
                    return sample
                except UnusableImage:  # a huge image is read when it is cropped
                    pass
            unusable.append(index)
        return {"views": None, "colours": None, "geometry": None, "unusable": unusable}


def draw_views(samplers: list[ViewSampler], image: Image.Image, key: str) -> dict[str, torch.Tensor]:
    """Return `views`, `colours`, `geometry` and, if there are any, `local_views` of the image with this key."""
    views, colours, places = zip(*(one.draw(image, view_rng(key, one)) for one in samplers), strict=True)
    sample = {"views": torch.stack(views[:2]), "colours": torch.tensor(colours), "geometry": torch.tensor(places)}
    return sample | ({"local_views": torch.stack(views[2:])} if len(views) > 2 else {})


def view_rng(key: str, sampler: ViewSampler) -> random.Random:
    """Return the generator of one view of the image with this key."""
    return random.Random(f"{key}/{sampler.view}")


def joint_reduction(samplers: list[ViewSampler], key: str, width: int, height: int) -> int:
    """Return how many times smaller an image may be decoded for all the views that are about to be drawn of it."""
    return min(sampler.reduction(width, height, view_rng(key, sampler)) for sampler in samplers)


def collate(samples: list[dict[str, Any]], captions: Captions | None = None) -> dict[str, Any]:
    """Return a batch: each tensor of the samples stacked, `unusable` a list; `views` None if one sample has none.

    Where there are `captions`, the samples' tokens become `input_ids` and `attention_mask`.
    """
    unusable = [index for sample in samples for index in sample["unusable"]]
    if any(sample["views"] is None for sample in samples):
        return {"views": None, "colours": None, "unusable": unusable}
    names = [name for name in samples[0] if name not in ("unusable", "tokens")]
    batch = {name: torch.stack(alike([sample[name] for sample in samples])) for name in names} | {"unusable": unusable}
    return batch if captions is None else batch | captions.batch([sample["tokens"] for sample in samples])


def alike(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of one type: those of images whose depths differ become float32."""
    if any(one.dtype != tensors[0].dtype for one in tensors):
        return [one.to(torch.float32) for one in tensors]
    return tensors


def split_batch(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """Return a batch of `collate` in so many parts of nearly equal size, fewer if it has fewer images."""
    if parts == 1:
        return [batch]
    tensors = {name: one.chunk(parts) for name, one in batch.items() if isinstance(one, torch.Tensor)}
    return [dict(zip(tensors, part, strict=True)) for part in zip(*tensors.values(), strict=True)]


def keyed_permutation(key: str, length: int, positions: np.ndarray) -> np.ndarray:
    """Return what stands at some positions of a permutation of `range(length)`, without making the others.

    A Feistel network permutes pairs (left, right) of an `a x b` grid with at least `length` cells: each round turns
    left by a hash of right, then swaps the two. A cell that is no index goes through the network again until it is
    one. Hashes are those of SplitMix64, by 64-bit keys of SHAKE-128, so that the order is the same on every machine.

    Args:
        key: Another key, another permutation.
        length: At least 1 and at most 2**62.
        positions: `(count,)`, whole numbers from 0 to `length - 1`.

    Returns:
        `(count,)` int64.

    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002: generalised Feistel, cycle walking.
    The sides differ by little, so that few cells are no index, and the first is even: odd permutations occur as well.
    """
    side = math.isqrt(length - 1) + 1
    first = side + side % 2
    second = -(-length // first)
    digest = hashlib.shake_128(key.encode()).digest(8 * FEISTEL_ROUNDS)
    rounds = np.frombuffer(digest, "<u8").astype(np.uint64)
    found = np.asarray(positions).astype(np.uint64)
    outside = np.arange(found.size)
    while outside.size:
        left, right = np.divmod(found[outside], np.uint64(second))
        sides = (first, second)
        for one in rounds:
            # the upper half of a hash, as a share of the side
            turn = (_splitmix(right ^ one) >> np.uint64(32)) * np.uint64(sides[0]) >> np.uint64(32)
            left, right = right, (left + turn) % np.uint64(sides[0])
            sides = sides[::-1]
        found[outside] = left * np.uint64(sides[1]) + right
        outside = outside[found[outside] >= length]
    return found.astype(np.int64)


def _splitmix(words: np.ndarray) -> np.ndarray:
    """Return a hash of each 64-bit word. Source: Steele, Lea and Flood, OOPSLA 2014, with Stafford's constants."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


@lru_cache(maxsize=1)
def _shuffled(key: str, length: int) -> list[int]:
    order = list(range(length))
    random.Random(key).shuffle(order)
    return order


class StepSampler(Sampler):
    """Yields this process's (epoch, index) keys, step after step, from any step on.

    Every epoch is a new permutation that depends on (seed, epoch) alone; the last, short batch is dropped. Of it only
    what a step takes is made, so that neither time nor memory grow with the number of images. Process r
    of W takes the r-th of W equal runs of each batch, so the batch is the same set of images whatever W is. Each
    process's share comes in `pieces` equal lists, one after the other.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        first_step: int,
        num_steps: int,
        rank: int,
        world_size: int,
        pieces: int = 1,
        order: str = KEYED,
    ):
        self.order = order
        self.num_images = num_images
        self.pieces = pieces
        self.batch_size = batch_size
        self.seed = seed
        self.steps = range(first_step, num_steps)
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def __len__(self) -> int:
        return len(self.steps) * self.pieces

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_images // self.batch_size
        for step in self.steps:
            epoch, position = divmod(step, steps_per_epoch)
            batch = range(position * self.batch_size, (position + 1) * self.batch_size)
            share = [(epoch, index) for index in self._indices(f"{self.seed}/{epoch}", batch[self.share])]
            length = len(share) // self.pieces
            for start in range(0, len(share), length):
                yield share[start : start + length]

    def _indices(self, key: str, positions: range) -> list[int]:
        if self.order == SHUFFLED:
            return _shuffled(key, self.num_images)[positions.start : positions.stop]
        return keyed_permutation(key, self.num_images, np.arange(positions.start, positions.stop)).tolist()
