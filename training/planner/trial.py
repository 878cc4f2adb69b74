"""A few steps taken for real, to learn how long one takes and how much memory it holds; then thrown away."""

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import BaseImageProcessor

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.engine.pretraining import pretraining_loop
from hf_vicreg.training.evaluation.features import BATCH_SIZE, encoded_batches, model_encoder, pixels_of
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.launch.signals import StopRequest
from hf_vicreg.training.planner.machine import Machine, give_back_memory, peak_memory, reset_peak
from hf_vicreg.training.planner.schedule import Rate
from hf_vicreg.training.pretrained.companions import add_companions
from hf_vicreg.training.run.config import RunConfig

MOST_STEPS = 2**31


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out what the run itself says again when it begins."""
    said = logging.getLogger("hf_vicreg.training.engine.optim")
    level = said.level
    said.setLevel(logging.WARNING)
    try:
        yield
    finally:
        said.setLevel(level)


@dataclass(frozen=True)
class Trial:
    """What a trial found.

    Attributes:
        rate: Of the steps.
        wait_ratio: Share of a step in which the device waited for images.
        read_seconds: To read and prepare one image for k-NN.
        encode_seconds: To encode it, reading left out.
        parameters: Of the encoder.
    """

    rate: Rate
    wait_ratio: float
    read_seconds: float
    encode_seconds: float
    parameters: int


def try_steps(
    config: RunConfig,
    source: ImageSource,
    processor: BaseImageProcessor,
    accelerator: Accelerator,
    machine: Machine,
    *,
    seconds: float,
    num_workers: int,
) -> Trial:
    """Take steps of a run that will not be kept; every process must call.

    Args:
        config: The run's.
        source: Its images.
        processor: Its image processor.
        accelerator: Its processes.
        machine: What each of them may use.
        seconds: About how long to take; three steps at least.
        num_workers: Loader processes.
    """
    run = replace(config.run, max_steps=MOST_STEPS, dataloader_num_workers=num_workers, expander_warmup_ratio=0.0)
    set_seed(run.seed)
    model = VicRegForPreTraining(config.vicreg)
    add_companions(model, config)
    stop = StopRequest(Path(run.output_dir), None)
    with _quietly():
        loop = pretraining_loop(replace(config, run=run), source, model, accelerator, None, stop)
    if machine.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    step_seconds, waits = loop.rehearse(seconds)
    peak = torch.cuda.max_memory_reserved() if machine.device == "cuda" else peak_memory()
    shown = source.first(min(BATCH_SIZE, len(source)))
    reading = time.perf_counter()
    for index in range(len(shown)):
        image = shown.read(index)
        if image is not None:
            pixels_of([image], processor, 1)
    read_seconds = (time.perf_counter() - reading) / len(shown)
    encoding = time.perf_counter()
    for _ in encoded_batches(shown, processor, model_encoder(model.encoder)):
        pass
    encode_seconds = (time.perf_counter() - encoding) / len(shown) - read_seconds
    parameters = sum(one.numel() for one in model.encoder.parameters())
    del loop, model
    accelerator.free_memory()
    give_back_memory()
    return Trial(
        rate=Rate(statistics.median(step_seconds), peak, config.step_size),
        wait_ratio=sum(waits) / sum(step_seconds),
        read_seconds=read_seconds,
        encode_seconds=max(0.0, encode_seconds),
        parameters=parameters,
    )
