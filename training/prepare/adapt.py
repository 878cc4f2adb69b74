"""Sparse attention learns to see what dense attention saw: `hf-vicreg convert SOURCE OUT --adapt IMAGES`.

The sparse encoder, which begins with the dense one's weights, is tuned until its features of patches and of images are
the dense one's again, on images without labels. Source of the loss: Romero et al. 2014, FitNets (arXiv 1412.6550),
with errors relative to the spread of the features, so that all sizes of images and both kinds count alike.
"""

import copy
import logging
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor

from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTModel
from hf_vicreg.training.engine.checkpoint import RunState
from hf_vicreg.training.engine.loop import LoopSettings, TrainingLoop
from hf_vicreg.training.engine.optim import parameter_groups
from hf_vicreg.training.engine.step import TrainingStep
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.colour import finish_views
from hf_vicreg.training.images.order import StepSampler, ViewDataset, collate
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.launch.distributed import build_accelerator
from hf_vicreg.training.planner.schedule import SPARE_RATIO
from hf_vicreg.training.prepare.agreement import (
    MOST_TOKENS,
    Agreement,
    Size,
    agreement_at,
    held_out_of,
    num_patches,
    pooled_at,
)
from hf_vicreg.training.run.arguments import ViewsConfig

logger = logging.getLogger(__name__)

LEARNING_RATE, WARMUP_RATIO, MAX_GRAD_NORM = 3e-4, 0.05, 1.0
FEWEST_IMAGES = 16


@dataclass(frozen=True)
class Adaptation:
    """What `adapt` did.

    Attributes:
        num_images: Tuned on.
        num_held_out: Measured on.
        steps: Taken, over all sizes in turn.
        seconds: Taken by them.
        before: One entry for each image size.
        after: The same.
    """

    num_images: int
    num_held_out: int
    steps: int
    seconds: float
    before: list[Agreement]
    after: list[Agreement]


def adapt(
    dense: BigBirdViTModel,
    sparse: BigBirdViTModel,
    source: ImageSource,
    processor: BaseImageProcessor,
    sizes: Sequence[Size],
    seconds: float,
    *,
    max_steps: int | None = None,
    seed: int = 0,
) -> Adaptation:
    """Tune a sparse encoder, in place, to a dense one's features, and return how far they agree before and after.

    Args:
        dense: With `attention_type="original_full"`; not changed.
        sparse: With the same weights and a sparse pattern.
        source: Images; a tenth, at most 256, are held out.
        processor: Their image processor.
        sizes: Image sizes (height, width) in pixels, which take turns.
        seconds: About how long all of it may take.
        max_steps: Steps, instead of what the time holds.
        seed: Of crops and order.

    Raises:
        InputError: Too few images, or no time for a step.
    """
    began = time.perf_counter()
    if len(source) < FEWEST_IMAGES:
        raise InputError(f"`adapt`: expected at least {FEWEST_IMAGES} images, found {len(source)}; give more.")
    held_out, images = held_out_of(source)
    accelerator = build_accelerator("no")
    dense = copy.deepcopy(dense).to(accelerator.device).eval().requires_grad_(False)
    sparse.to(accelerator.device)
    target = [pooled_at(dense, held_out, processor, size) for size in sizes]
    before = agreement_at(sparse, target, held_out, processor, sizes)
    measuring = time.perf_counter() - began  # about as long as it will take in the end
    make = partial(AdaptationStep, dense, source=images, processor=processor, sizes=sizes, accelerator=accelerator)
    num_steps = max_steps
    if num_steps is None:
        taken, _ = _loop(make(copy.deepcopy(sparse), seed=seed), accelerator).rehearse(seconds / 20)
        left = seconds - 2 * measuring - (time.perf_counter() - began - measuring)
        num_steps = int(left * SPARE_RATIO / statistics.fmean(taken))
        if num_steps < len(sizes):
            raise InputError(
                f"`time_budget`: expected time for a step at each of {len(sizes)} image sizes, a step takes "
                f"{statistics.fmean(taken):.1f} s of {max(0.0, left):.0f} s that are left; raise it."
            )
    step = make(sparse, seed=seed, num_steps=num_steps)
    logger.info("%d steps of %s images, %d held out", num_steps, step.batch_sizes, len(held_out))
    state = _loop(step, accelerator).fit()
    after = agreement_at(sparse.eval(), target, held_out, processor, sizes)
    sparse.cpu()
    return Adaptation(len(images), len(held_out), state.step, round(state.training_seconds, 1), before, after)


class AdaptationStep(TrainingStep[torch.Tensor]):
    """Crops of images through both encoders; each step at one of the sizes, in turn."""

    def __init__(
        self,
        dense: BigBirdViTModel,
        sparse: BigBirdViTModel,
        source: ImageSource,
        processor: BaseImageProcessor,
        sizes: Sequence[Size],
        accelerator: Accelerator,
        *,
        seed: int,
        num_steps: int = 1000,
    ):
        """Set up optimiser and data order; arguments as for `adapt`."""
        self.dense, self.source, self.sizes, self.accelerator, self.seed = dense, source, sizes, accelerator, seed
        self.normalisation = (list(processor.image_mean), list(processor.image_std))
        # as many patches in a step of one size as in another
        patches = [num_patches(sparse, size) for size in sizes]
        self.batch_sizes = [max(1, min(64, len(source), MOST_TOKENS // one)) for one in patches]
        self.images_per_step = max(self.batch_sizes)
        self.steps_per_epoch = max(1, len(source) // self.images_per_step)
        self.num_steps = num_steps
        self.model = accelerator.prepare_model(sparse, evaluation_mode=True)
        optimizer = torch.optim.AdamW(parameter_groups(sparse, 0.0), lr=LEARNING_RATE)
        self.optimizer = accelerator.prepare_optimizer(optimizer)

    def batches(self, first_step: int) -> Iterable[dict[str, Any]]:
        """Return batches of crops of the largest size."""
        plain = ViewsConfig(
            crop_min_ratio=0.3, jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0,
            solarize_probability=0.0,
        )  # fmt: skip
        largest = max(self.sizes, key=lambda size: size[0] * size[1])
        sampler = ViewSampler(plain, largest, (plain.crop_min_ratio, 1.0), 0)
        order = StepSampler(len(self.source), self.images_per_step, self.seed, first_step, self.num_steps, 0, 1)
        return DataLoader(
            ViewDataset(self.source, [sampler], self.seed),
            batch_sampler=_Shortened(order, self.batch_sizes, first_step),
            collate_fn=collate,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def backward(self, batches: Sequence[dict[str, Any]], step: int) -> torch.Tensor:
        """The gradient of the relative errors of patches and pooled features; see `TrainingStep`."""
        (batch,) = batches
        if batch["views"] is None:
            raise InputError("`adapt`: expected readable images, found too many corrupt ones in a row; check them.")
        size = self.sizes[step % len(self.sizes)]
        crops = batch["views"][:, 0]
        if crops.shape[-2:] != torch.Size(size):  # on the CPU: a GPU has no such interpolation of bytes
            crops = F.interpolate(crops, size, mode="bilinear", antialias=True)
        crops = crops.to(self.accelerator.device)
        pixel_values = finish_views(crops, batch["colours"][:, 0], self.normalisation)
        with torch.no_grad():
            wanted = self.dense(pixel_values)
        found = self.model(pixel_values)
        first = 1 + self.dense.config.num_register_tokens
        loss = relative_error(found.last_hidden_state[:, first:], wanted.last_hidden_state[:, first:])
        loss = loss + relative_error(found.pooler_output, wanted.pooler_output)
        self.accelerator.backward(loss)
        return loss.detach()

    def loss_of(self, outcome: torch.Tensor) -> torch.Tensor:
        """Return the sum of both errors."""
        return outcome

    def record(self, outcome: torch.Tensor) -> dict[str, float]:
        """Return the loss alone."""
        return {"loss": outcome.item()}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return `sum |found - wanted|^2 / sum |wanted - mean|^2`, scalar; 1 is what the mean alone would have.

    Args:
        found: `(..., features)`.
        wanted: The same shape; the mean is over all but the last dimension.
    """
    wanted = wanted.flatten(0, -2).detach()
    spread = (wanted - wanted.mean(0)).square().sum()
    return (found.flatten(0, -2) - wanted).square().sum() / spread.clamp(min=torch.finfo(spread.dtype).tiny)


class _Shortened:
    """Batches of the sampler, cut to the size that their step takes."""

    def __init__(self, order: StepSampler, batch_sizes: Sequence[int], first_step: int):
        self.order, self.batch_sizes, self.first_step = order, batch_sizes, first_step

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step, keys in enumerate(self.order, self.first_step):
            yield keys[: self.batch_sizes[step % len(self.batch_sizes)]]


def _loop(step: AdaptationStep, accelerator: Accelerator) -> TrainingLoop:
    settings = LoopSettings(LEARNING_RATE, WARMUP_RATIO, MAX_GRAD_NORM)
    return TrainingLoop(step, settings, accelerator, RunState(), folder=None)
