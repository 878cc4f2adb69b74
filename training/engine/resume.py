"""Going on where a run was: from which checkpoint, and whether it is this run's."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hf_vicreg.training.engine.average import WeightAverage
from hf_vicreg.training.engine.checkpoint import (
    RunState,
    checkpoint_writer,
    copied,
    find_checkpoint,
    load_state,
    load_tensors,
    local_rng_states,
)
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.launch.background import Background
from hf_vicreg.training.launch.distributed import run_on_main
from hf_vicreg.training.launch.sharding import is_sharded
from hf_vicreg.training.objectives.registry import entries_of
from hf_vicreg.training.run.arguments import PretrainArguments, ViewsConfig
from hf_vicreg.training.run.section_flags import MODEL, VICREG
from hf_vicreg.training.run.settings import DEFAULT_MODEL_TYPE

logger = logging.getLogger(__name__)

# What was measured before the first step, by its name among the accuracies.
BEFORE = ("raw_pixels", "untrained", "second_untrained")
# What may differ when a run is resumed: where and how it is watched, never what is computed.
RESUMABLE_CHANGES = {
    "output_dir",
    "train_dir",  # the same images may lie elsewhere: their contents are compared
    "dataset_name",
    "dataloader_num_workers",
    "logging_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "checkpoints_keep_every_steps",
    "resume_from_checkpoint",
    "max_time",
    "max_skipped_steps",
    "gradient_checkpointing",
    "torch_compile",
    "shard_weights",
    "dp_shard_size",
    "attn_implementation",
    "knn_every_epochs",
    "linear_probe",
    "with_tracking",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "device",
    "time_budget",
    "max_memory",
    "plan_only",
    "per_device_train_batch_size",  # resolved into batch_size
}
DEFAULTS: dict[str, Any] = {one.name: one.default for one in dataclasses.fields(PretrainArguments)}
MODEL_DEFAULTS: dict[str, Any] = {name: one.default for name, one in MODEL.items()}
VICREG_DEFAULTS: dict[str, Any] = {name: one.default for name, one in VICREG.items()}


def checkpoint_to_resume(run: Any, accelerator: Accelerator) -> Path | None:
    """Return the checkpoint that a run asks for, None for a new start; every process must call.

    Args:
        run: Settings with an `output_dir` and `resume_from_checkpoint`.
        accelerator: Its processes.

    Raises:
        InputError: As `find_checkpoint`; or processes see different checkpoints.
    """
    if run.resume_from_checkpoint is None:
        return None
    found, error = None, None
    try:
        found = find_checkpoint(Path(run.output_dir) / "checkpoints", run.resume_from_checkpoint)
    except InputError as one:
        error = one
    if accelerator.num_processes > 1:
        # errors, too: a process that leaves would keep the others waiting
        seen = set(gather_object([str(error) if error is not None else None if found is None else found.name]))
        if len(seen) > 1:
            raise InputError(
                f"`output_dir`: expected every machine to see the same checkpoints in {run.output_dir}, got "
                f"{sorted(map(str, seen))}; put it on a file system that all of them share."
            )
    if error is not None:
        raise error
    if found is None:
        if (Path(run.output_dir) / "model.safetensors").exists():
            raise InputError(
                f"`resume_from_checkpoint`: {run.output_dir} holds an encoder but no checkpoint to go on "
                "from; choose another `output_dir`."
            )
        logger.info("no checkpoint in %s yet: starting at step 0", run.output_dir)
    return found


def resume_from(
    checkpoint: Path,
    expected: RunState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    num_steps: int,
) -> RunState:
    """Load a checkpoint into model, optimiser, generators and scaler, and return where the run stands.

    Args:
        checkpoint: Its folder.
        expected: With the run's own configuration and data, at step 0.
        model: In place.
        optimizer: In place.
        accelerator: Whose scaler and rank.
        num_steps: Of the whole run, for the log.

    Raises:
        InputError: It belongs to another configuration or other data.
    """
    state = load_state(checkpoint)
    refuse_other_configuration(state, expected)
    load_tensors(checkpoint, model, optimizer, accelerator.process_index)
    if accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    used, before = (_plain((one.recipe.get("model") or {}).get("image_size")) for one in (expected, state))
    if used != before:  # what was measured before the first step was with images of another size
        for measured in (state.knn, state.linear):
            for key in BEFORE:
                measured.pop(key, None)
    state.recipe = expected.recipe
    logger.info("resumed from %s at step %d of %d", checkpoint.name, state.step, num_steps)
    return state


def refuse_other_configuration(found: RunState, expected: RunState) -> None:
    """Raise InputError if a checkpoint's configuration or data differ from the run's, naming each difference."""
    # a checkpoint of before a flag was there was trained with what is its default
    one: dict[str, Any] = DEFAULTS | expected.recipe
    other: dict[str, Any] = DEFAULTS | found.recipe
    for recipe in (one, other):
        for entry in entries_of(recipe.get("objective", "vicreg")):
            if entry.settings:
                recipe[entry.name] = {name: one.default for name, one in entry.settings.items()} | recipe[entry.name]
        recipe["vicreg"] = VICREG_DEFAULTS | (recipe.get("vicreg") or {})
        recipe["views"] = dataclasses.asdict(ViewsConfig()) | (recipe.get("views") or {})
        for section in ("model", "second_model"):
            if (recipe.get(section) or {}).get("model_type") == DEFAULT_MODEL_TYPE:
                recipe[section] = MODEL_DEFAULTS | recipe[section]
                recipe["views"]["image_size"] = _plain(recipe["views"]["image_size"] or recipe[section]["image_size"])
                if recipe[section]["position_embedding_type"] == "rope":
                    del recipe[section]["image_size"]  # of use alone: no weight depends on it
    one, other = _flat(one), _flat(other)
    differences = [
        f"`{key}` is {one.get(key)!r}, the checkpoint has {other.get(key)!r}"
        for key in sorted(one.keys() | other.keys())
        if key not in RESUMABLE_CHANGES and one.get(key) != other.get(key)
    ]
    if found.data_fingerprint != expected.data_fingerprint:
        differences.append("the images are not the ones it was trained on")
    if differences:
        raise InputError(
            f"`resume_from_checkpoint`: the checkpoint is of another configuration: {'; '.join(differences)}; "
            "resume with the run's own settings or start in a new folder."
        )


def _plain(size: Any) -> Any:
    """A height and a width that are equal as one number."""
    return size[0] if isinstance(size, list | tuple) and len(set(size)) == 1 else size


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe's sections by their dotted names, beside the others."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        found |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return found


def checkpoint_together(
    folder: Path,
    state: RunState,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    accelerator: Accelerator,
    keep_every_steps: int | None = None,
    average: WeightAverage | None = None,
    *,
    background: Background,
    wait: bool,
) -> None:
    """Write one checkpoint of all processes beside the training; every process must call. See `checkpoint_writer`.

    An error of the checkpoint before is raised here. With `wait` this one is on the disk afterwards.
    """
    states = local_rng_states(accelerator.process_index)
    if accelerator.num_processes > 1:
        states = {key: one for share in gather_object([states]) for key, one in share.items()}

    held = None
    if is_sharded(model):  # gathered by all, kept by one
        run_on_main(background.wait, accelerator)
        held = copied(model, optimizer, average, keep=accelerator.is_main_process)

    def write() -> None:
        background.wait()  # two copies at a time would take more memory
        files = copied(model, optimizer, average) if held is None else held
        background.start(checkpoint_writer(folder, state, files, states, keep, keep_every_steps))
        if wait:
            background.wait()

    run_on_main(write, accelerator)
