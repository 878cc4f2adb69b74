"""A few steps taken for real, to learn how long one takes and how much memory it holds; then thrown away."""

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import BaseImageProcessor

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.engine.pretraining import pretraining_loop
from hf_vicreg.training.evaluation.features import BATCH_SIZE, encoded_batches, model_encoder, pixels_of
from hf_vicreg.training.image_text.probe import ImageTextProbe
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.images.run_images import usable_images
from hf_vicreg.training.launch.devices import device_module
from hf_vicreg.training.launch.distributed import run_on_main
from hf_vicreg.training.launch.signals import StopRequest
from hf_vicreg.training.planner.choices import Choices
from hf_vicreg.training.planner.machine import Machine, give_back_memory, peak_memory, reset_peak
from hf_vicreg.training.planner.schedule import Rate
from hf_vicreg.training.pretrained.companions import add_companions
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.run.processors import build_processor

logger = logging.getLogger(__name__)

MOST_STEPS = 2**31
TRIAL_RATIO = 0.03  # of the time that is left, for each trial
TRIAL_SECONDS = (2.0, 20.0)
SLOW_DATA_RATIO = 0.25  # waiting for images longer than that is worth a loader process


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
        mean_step_seconds: Of the same steps; above the median where some are slow.
        wait_ratio: Share of a step in which the device waited for images.
        read_seconds: To read and prepare one image for k-NN.
        encode_seconds: To encode it, reading left out.
        retrieval_seconds: To read an image and encode it with its captions, over all processes; 0 without captions.
        parameters: Of the encoder.
    """

    rate: Rate
    mean_step_seconds: float
    wait_ratio: float
    read_seconds: float
    encode_seconds: float
    retrieval_seconds: float
    parameters: int


def try_plan(
    made: Choices, config: RunConfig, source: ImageSource, accelerator: Accelerator, machine: Machine, left: float
) -> Trial:
    """Try steps of a plan, with and without loader processes where images are slow to come; every process must call.

    Args:
        made: The plan's choices; how many loader processes there are is filled in.
        config: The run's.
        source: Its images, whole.
        accelerator: Its processes.
        machine: What each of them may use.
        left: Seconds for training, of which this takes a small share.
    """
    logger.info("trying a few steps of the plan, to see how fast they are")
    seconds = min(max(left * TRIAL_RATIO, TRIAL_SECONDS[0]), TRIAL_SECONDS[1])
    arguments = (config, usable_images(source, config), build_processor(config), accelerator, machine)
    given = config.run.dataloader_num_workers
    first = 0 if machine.device == "cpu" else min(8, machine.cores)
    trial = try_steps(*arguments, seconds=seconds, num_workers=first if given is None else given)
    trial = run_on_main(lambda: trial, accelerator)
    if given is not None:
        return trial
    workers, why = first, f"images take {trial.wait_ratio:.0%} of a step"
    if machine.device == "cpu" and trial.wait_ratio > SLOW_DATA_RATIO and machine.cores > 1:
        other = try_steps(*arguments, seconds=seconds, num_workers=machine.cores)
        other = run_on_main(lambda: other, accelerator)
        if other.rate.step_seconds < 0.95 * trial.rate.step_seconds:
            why = f"{trial.rate.step_seconds / other.rate.step_seconds:.1f} times as fast as none"
            workers, trial = machine.cores, other
    made.fill("dataloader_num_workers", workers, why)
    return trial


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
    add_companions(model, config, source)
    stop = StopRequest(Path(run.output_dir), None)
    with _quietly():
        loop = pretraining_loop(replace(config, run=run), source, model, accelerator, None, stop)
    module = device_module(machine.device)
    # the CPU has none, nor `mps`, which shares its memory
    reserved = getattr(module, "max_memory_reserved", None)
    if module is not None and reserved is not None:
        module.reset_peak_memory_stats()
    else:
        reset_peak()
    step_seconds, waits = loop.rehearse(seconds)
    peak = peak_memory() if reserved is None else reserved()
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
    retrieving = time.perf_counter()
    if shown.captions is not None:
        ImageTextProbe(shown, processor, model, accelerator).measure()
    retrieval_seconds = (time.perf_counter() - retrieving) / len(shown)
    parameters = sum(one.numel() for one in model.encoder.parameters())
    del loop, model
    accelerator.free_memory()
    give_back_memory()
    return Trial(
        rate=Rate(statistics.median(step_seconds), peak, config.step_size),
        mean_step_seconds=statistics.fmean(step_seconds),
        wait_ratio=sum(waits) / sum(step_seconds),
        read_seconds=read_seconds,
        encode_seconds=max(0.0, encode_seconds),
        retrieval_seconds=retrieval_seconds,
        parameters=parameters,
    )
