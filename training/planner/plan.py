"""From what was given, the images, the machine and the time to a run's configuration, measured before step 1."""

import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.images.streaming import ImageStream
from hf_vicreg.training.images.unusable import too_few
from hf_vicreg.training.launch.cores import local_processes
from hf_vicreg.training.launch.distributed import run_on_main
from hf_vicreg.training.launch.sharding import refuse_shard_size
from hf_vicreg.training.planner.choices import (
    EVENING_SECONDS,
    LADDER,
    MAX_EPOCHS,
    MEASURING_RATIO,
    MIN_IMAGES,
    Choices,
    Images,
    choose,
    choose_schedule,
    is_open,
)
from hf_vicreg.training.planner.machine import Machine, this_machine
from hf_vicreg.training.planner.measuring import measuring_seconds
from hf_vicreg.training.planner.memory import fit_memory
from hf_vicreg.training.planner.schedule import CLOSING_SECONDS, steps_within, words
from hf_vicreg.training.planner.table import plan_table, say_defaults
from hf_vicreg.training.planner.trial import Trial, try_plan
from hf_vicreg.training.run.arguments import bytes_of, seconds_of
from hf_vicreg.training.run.checks import check_statistics_batch
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.run.run_folder import RECIPE
from hf_vicreg.training.run.settings import explicit_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run's configuration and, where it was planned, how it came about, for people."""

    config: RunConfig
    table: str = ""


def configure(
    settings: dict[str, Any],
    config: RunConfig,
    source: ImageSource | ImageStream,
    held_out: ImageSource | None,
    accelerator: Accelerator,
    *,
    began: float,
) -> Plan:
    """Return what a run is to be made of; every process must call.

    A run that leaves its length, batch or encoder open is planned, and so is one of which only the plan is wanted. Any
    other stays as it is, but for a batch that does not fit into the memory at once. A resumed run is what it was. A
    stream, whose length nobody knows, is not planned.

    Args:
        settings: Explicit ones.
        config: What they are with every default.
        source: Images to train on.
        held_out: Labelled images to measure k-NN on, if there are any.
        accelerator: The run's processes.
        began: When the command began, by `time.monotonic`.

    Raises:
        InputError: As `plan_run`; or a batch of fewer than two images, or a number of processes that `dp_shard_size`
            does not divide.
    """
    run, processes = config.run, accelerator.num_processes
    refuse_shard_size(run.dp_shard_size, processes)
    machine = this_machine(
        accelerator.device,
        max_memory=bytes_of(run.max_memory) if run.max_memory else None,
        num_processes=processes,
        local_processes=local_processes(),
    )
    # before its recipe there is nothing to resume: a flag that is always given does not leave a new run unplanned
    resuming = run.resume_from_checkpoint is not None and (Path(run.output_dir) / RECIPE).is_file()
    if isinstance(source, ImageSource) and (is_open(settings) or run.plan_only) and not resuming:
        return plan_run(settings, source, held_out, accelerator, machine, began=began)
    if not resuming:
        say_defaults(settings, config)
    if run.per_device_train_batch_size is not None:
        batch = run.per_device_train_batch_size * processes
        if batch < 2:
            raise InputError(
                "`per_device_train_batch_size`: expected at least 2 images in all for a covariance, got 1."
            )
        # the stored recipe says it once
        config = replace(config, run=replace(run, batch_size=batch, per_device_train_batch_size=None))
        check_statistics_batch(config.run)
    if not resuming and config.run.batch_size % processes == 0:
        wanted = config.run.batch_size
        config = run_on_main(partial(_fitted, config, machine), accelerator)
        if config.run.batch_size != wanted:
            logger.warning(
                "batch_size: %d instead of %d images go through the encoder at once, for want of memory (%.1f GB); "
                "the batch of the loss stays %d",
                config.run.batch_size,
                wanted,
                machine.memory / 2**30,
                config.step_size,
            )
    return Plan(config)


def _fitted(config: RunConfig, machine: Machine) -> RunConfig:
    try:
        return fit_memory(config, machine)[0]
    except InputError:
        raise
    except (ValueError, RuntimeError, TypeError):
        return config  # no encoder of such images; the checks of the real model say so in their own words


def with_stored_plan(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run to resume above those it was planned with, so that it keeps its plan."""
    recipe = Path(settings["output_dir"]) / RECIPE
    if settings.get("resume_from_checkpoint") is None or not recipe.is_file() or not is_open(settings):
        return settings
    kept = {key: one for key, one in settings.items() if key != "time_budget"}  # it has set the length already
    return explicit_settings({"config": str(recipe)} | kept)


def drafted(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings to open the images with: no default of patches or tiles refuses what is yet to be planned."""
    model, views = settings.get("model", {}), settings.get("views", {})
    if not is_open(settings) or "model_type" in model or settings.get("model_name_or_path"):
        return settings
    size = views.get("image_size") or model.get("image_size") or 224
    shortest = min(size) if isinstance(size, list | tuple) else size
    patch = model.get("patch_stride") or max(1, min(16, shortest // 8))
    return settings | {"model": {"patch_size": patch, "tile_size": 1} | model}


def plan_run(
    settings: dict[str, Any],
    source: ImageSource,
    held_out: ImageSource | None,
    accelerator: Accelerator,
    machine: Machine,
    *,
    began: float,
) -> Plan:
    """Return the plan of a run; every process must call, and gets the same one.

    Args:
        settings: Explicit ones.
        source: Images to train on.
        held_out: Labelled images to measure k-NN on, if there are any.
        accelerator: The run's processes.
        machine: What each of them may use.
        began: When the command began, by `time.monotonic`: the time that is given counts from there.

    Raises:
        InputError: Too few images, too little time for one pass over them, or too little memory.
    """
    budget = seconds_of(settings["time_budget"]) if settings.get("time_budget") else EVENING_SECONDS
    images = survey(source, held_out)
    # whatever a decision hangs on is the main process's: they would wait for each other for ever if they differed
    left = run_on_main(lambda: budget - (time.monotonic() - began), accelerator)
    made, config, peak, trial = choose_and_try(settings, source, images, accelerator, machine, left)
    left = budget - (time.monotonic() - began)

    def fit() -> Plan:
        return _fit_schedule(made, config, images, machine, trial, held_out, peak=peak, left=left, budget=budget)

    return run_on_main(fit, accelerator)


def choose_and_try(
    settings: dict[str, Any],
    source: ImageSource,
    images: Images,
    accelerator: Accelerator,
    machine: Machine,
    left: float,
) -> tuple[Choices, RunConfig, int, Trial]:
    """Return what is chosen for `left` seconds of training, its predicted memory in bytes and how fast its steps are.

    Every process must call.

    Raises:
        InputError: Too little memory.
    """
    made, config, peak = run_on_main(partial(_choose_fitting, settings, images, machine, left, None), accelerator)
    trial = try_plan(made, config, source, accelerator, machine, left)
    while _too_slow(made, config, trial, images, left):
        # slower than was thought: a smaller encoder sees images enough
        assert made.rung is not None  # it has a smaller one
        smaller = partial(_choose_fitting, settings, images, machine, left, made.rung - 1)
        made, config, peak = run_on_main(smaller, accelerator)
        trial = try_plan(made, config, source, accelerator, machine, left)
    return made, config, peak, trial


def survey(source: ImageSource, held_out: ImageSource | None) -> Images:
    """Return what is to be known of the images.

    Raises:
        InputError: Too few that can be used.
    """
    usable = source.count_usable(MIN_IMAGES)
    if usable < MIN_IMAGES:
        raise InputError(f"`data`: {too_few(source, usable, MIN_IMAGES)} (`hf-vicreg inspect images` lists them all).")
    found = source.survey()
    labelled = source.labels is not None and held_out is not None and held_out.labels is not None
    return Images(len(source), *found.median_size, labelled)


def _choose_fitting(
    settings: dict[str, Any], images: Images, machine: Machine, seconds: float, at_most: int | None
) -> tuple[Choices, RunConfig, int]:
    """Choose, and step down the ladder while the memory does not suffice."""
    while True:
        made = choose(settings, images, machine, seconds, at_most=at_most)
        config = resolve(made.settings | {"per_device_train_batch_size": None})
        try:
            config, peak = fit_memory(config, machine)
        except InputError:
            if not made.rung:
                raise
            at_most = made.rung - 1
            continue
        return made, config, peak


def _fit_schedule(
    made: Choices,
    config: RunConfig,
    images: Images,
    machine: Machine,
    trial: Trial,
    held_out: ImageSource | None,
    *,
    peak: int,
    left: float,
    budget: float,
) -> Plan:
    """Fill in the length of the run and return the plan."""
    run = config.run
    before, measured = measuring_seconds(config, images, held_out, machine, trial)
    step = trial.rate.step_seconds
    per_epoch = max(1, images.count // config.step_size)
    ends = before + measured + CLOSING_SECONDS
    between = MEASURING_RATIO * left // measured * measured if measured else 0.0
    given_length = made.settings.keys() & {"num_train_epochs", "max_steps"}
    if given_length:  # it holds, whatever the time
        steps = run.max_steps or run.num_train_epochs * per_epoch
    else:
        steps = steps_within(
            left - ends - between, step, per_epoch, most_epochs=MAX_EPOCHS, images=images.count, budget=budget
        )
    choose_schedule(made, steps, per_epoch, step, measured)
    planned = resolve(made.settings | {"per_device_train_batch_size": None})
    fitting = replace(planned.run, batch_size=run.batch_size, statistics_batch_size=run.statistics_batch_size)
    planned = replace(planned, run=fitting)
    every = planned.run.knn_every_epochs
    meanwhile = int(steps / per_epoch / every) * measured if every else 0.0
    seconds = budget - left + ends + steps * step + meanwhile
    if given_length and seconds > budget and made.settings.get("time_budget"):
        logger.warning("the length that was given takes %s, longer than the %s given", words(seconds), words(budget))
    table = plan_table(
        planned,
        made,
        images,
        machine,
        trial.rate,
        predicted_memory=peak,
        parameters=trial.parameters,
        seconds=seconds,
        budget=budget,
    )
    return Plan(planned, table)


def _too_slow(made: Choices, config: RunConfig, trial: Trial, images: Images, left: float) -> bool:
    """Whether a smaller encoder would be the better choice at the speed that was measured."""
    if not made.rung:
        return False
    wanted = min(LADDER[made.rung].images_seen, MAX_EPOCHS * images.count)
    return left / trial.rate.step_seconds * config.step_size < wanted / 2
