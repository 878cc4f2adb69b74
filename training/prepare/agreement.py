"""How far the features of a sparse encoder agree with those of a dense one, on images held out for that."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import BaseImageProcessor

from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTModel
from hf_vicreg.training.evaluation.features import encoded_batches
from hf_vicreg.training.evaluation.neighbours import nearest_in_bank
from hf_vicreg.training.images.sources import ImageSource

MOST_TOKENS = 8192  # patches of all images at once
MOST_HELD_OUT, HELD_OUT_RATIO, NUM_NEIGHBOURS = 256, 0.1, 10
Size = tuple[int, int]


@dataclass(frozen=True)
class Agreement:
    """How far a sparse encoder's features of images agree with the dense one's, on images that nobody was tuned on.

    Attributes:
        height: Image height in pixels.
        width: Image width in pixels.
        cosine: Of the pooled features of an image, dense and sparse; the mean.
        neighbours: Share of an image's ten nearest others by dense features that are among its ten nearest by sparse.
    """

    height: int
    width: int
    cosine: float
    neighbours: float


def num_patches(model: BigBirdViTModel, size: Size) -> int:
    """Return how many patches an image of a size has."""
    rows, columns = model.config.grid_size(*size)
    return rows * columns


def held_out_of(source: ImageSource) -> tuple[ImageSource, ImageSource]:
    """Return images to measure on, the same for the same source, and the others."""
    order = list(range(len(source)))
    random.Random(0).shuffle(order)  # folders are in order
    count = max(NUM_NEIGHBOURS + 2, min(MOST_HELD_OUT, int(HELD_OUT_RATIO * len(source))))
    return _chosen(source, sorted(order[:count])), _chosen(source, sorted(order[count:]))


def _chosen(source: ImageSource, indices: list[int]) -> ImageSource:
    read = partial(_read_chosen, source.read_bytes, indices)
    return replace(source, length=len(indices), read_bytes=read, labels=None, file_names=None, paths=None)


def _read_chosen(read_bytes: Any, indices: list[int], index: int) -> bytes:
    return read_bytes(indices[index])


def pooled_at(model: BigBirdViTModel, source: ImageSource, processor: BaseImageProcessor, size: Size) -> torch.Tensor:
    """Return pooled features `(readable images, features)` at a size, on the CPU."""
    sized = partial(processor, size={"height": size[0], "width": size[1]}, do_resize=True, do_center_crop=False)
    encode = lambda pixels: model(pixels.to(model.device)).pooler_output  # noqa: E731
    model.eval()
    found = encoded_batches(source, sized, encode, batch_size=max(1, MOST_TOKENS // num_patches(model, size)))
    return torch.cat([features for _, _, features in found])


def agreement_at(
    sparse: BigBirdViTModel,
    target: Sequence[torch.Tensor],
    source: ImageSource,
    processor: BaseImageProcessor,
    sizes: Sequence[Size],
) -> list[Agreement]:
    """Return how far an encoder's features of a source agree with wanted ones, an entry for each size."""
    agreement = []
    for wanted, size in zip(target, sizes, strict=True):
        found = pooled_at(sparse, source, processor, size)
        cosine = F.cosine_similarity(found.double(), wanted.double()).mean().item()
        count = min(NUM_NEIGHBOURS, len(wanted) - 1)
        near, expected = (_nearest_others(one, count) for one in (found, wanted))
        shared = (near[:, :, None] == expected[:, None]).any(2).double().mean().item()
        agreement.append(Agreement(*size, cosine=cosine, neighbours=shared))
    return agreement


def _nearest_others(features: torch.Tensor, count: int) -> torch.Tensor:
    """Places `(images, count)` of the nearest other images."""
    centred = features - features.mean(0)  # what all images have in common makes all of them alike
    found = torch.cat([nearest for _, nearest in nearest_in_bank(centred, centred, count + 1)])
    own = torch.arange(len(found))[:, None]
    # its own place is among them unless a copy of it took that
    others = torch.where((found == own).any(1, keepdim=True), (found == own).int(), 0)
    others[(found != own).all(1), -1] = 1
    return found[others == 0].view(len(found), count)
