"""The plan as a person reads it: each value, why it has it, and what it costs."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from hf_vicreg.training.planner.choices import Choices, Images, density
from hf_vicreg.training.planner.machine import Machine
from hf_vicreg.training.planner.schedule import Rate, words
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.run.view_presets import VIEW_PRESETS

logger = logging.getLogger(__name__)


def say_defaults(settings: dict[str, Any], config: RunConfig) -> None:
    """Log the widths of an expander that neither a person nor a plan chose: they are those of a large batch."""
    if "expander_sizes" not in settings.get("vicreg", {}) and config.entry.uses_expander:
        widths = "-".join(map(str, config.vicreg.expander_sizes))
        logger.info("not planned, as encoder, batch and length are given: the expander is %s, the default", widths)


def plan_table(
    config: RunConfig,
    made: Choices,
    images: Images,
    machine: Machine,
    rate: Rate,
    *,
    predicted_memory: int,
    parameters: int,
    seconds: float,
    budget: float,
) -> str:
    """Return the plan as lines of text.

    Args:
        config: The run's.
        made: Where its values come from.
        images: To train on.
        machine: That it runs on.
        rate: Measured.
        predicted_memory: Bytes at the peak, from the shapes alone.
        parameters: Of the encoder.
        seconds: The whole command is expected to take.
        budget: Seconds that were given.
    """
    run, model = config.run, made.settings.get("model", {})
    why = made.reasons
    height, width = config.image_size
    rows: list[tuple[str, str, str]] = []
    if config.vicreg.encoder.model_type == "bigbird_vit":
        encoder = config.vicreg.encoder
        rows.append(
            (
                "encoder",
                f"{encoder.hidden_size} wide, {encoder.num_hidden_layers} layers, {parameters / 1e6:.2f} M parameters",
                why.get("model.hidden_size", "given"),
            )
        )
        rows.append(("views", f"{height} x {width} pixels", why.get("views.image_size", "given")))
        if config.used_image_size != config.image_size:
            used = " x ".join(map(str, config.used_image_size))
            rows.append(("used with", f"{used} pixels", why.get("model.image_size", "given")))
        grid = "x".join(map(str, encoder.grid_size(height, width)))
        (patch, _), (stride, _) = encoder.patch_size_hw, encoder.patch_stride_hw
        rows.append(
            (
                "patches",
                f"{grid}, {patch} pixels, every {stride}",
                why.get("model.patch_stride", why.get("model.patch_size", "given")),
            )
        )
        on_views = density(encoder.to_dict() | model | {"image_size": (height, width)})
        rows.append(
            (
                "attention",
                f"density {on_views:.3f}: tile {encoder.tile_size}, {encoder.num_random_blocks} random",
                why.get("model.tile_size", "given"),
            )
        )
    else:
        rows.append(("encoder", f"{config.vicreg.encoder.model_type}, {parameters / 1e6:.2f} M parameters", "given"))
        rows.append(("views", f"{height} x {width} pixels", why.get("views.image_size", "given")))
    if config.views.jitter_probability and not config.views.quarter_turn_probability:
        names = [name for name, preset in VIEW_PRESETS.items() if not preset.get("jitter_probability", 1)]
        rows.append(("augmentation", "that of photographs", f"--views.preset has {', '.join(names)}"))
    batch = f"{config.step_size}"
    if config.step_size != run.batch_size:
        batch += f", {run.batch_size} at once"
    rows.append(("batch", batch, why.get("batch_size", "given") if config.step_size == run.batch_size else "memory"))
    sizes = "-".join(map(str, config.vicreg.expander_sizes))
    rows.append(("expander", sizes, why.get("vicreg.expander_sizes", "given")))
    rows.append(("learning rate", f"{run.learning_rate:g}", why.get("learning_rate", "given")))
    if run.expander_lr_scale != 1:
        reason = why.get("expander_lr_scale", "given")
        rows.append(("of the expander", f"{run.learning_rate * run.expander_lr_scale:.2g}", reason))
    workers = why.get("dataloader_num_workers", "given")
    rows.append(("loader processes", str(run.dataloader_num_workers), workers))
    per_epoch = max(1, images.count // config.step_size)
    steps = run.max_steps or run.num_train_epochs * per_epoch  # of which a person may have given either
    length = f"{steps:,} steps, {math.ceil(steps / per_epoch):,} epochs"
    rows.append(("length", length, why.get("max_steps", "given")))
    rows.append(("checkpoint", f"every {run.checkpointing_steps} steps", why.get("checkpointing_steps", "given")))
    if images.labelled:
        rows.append(("k-NN", f"every {run.knn_every_epochs} epochs", why.get("knn_every_epochs", "given")))
    elif "knn_every_epochs" in why:  # there are captions
        rows.append(("retrieval", f"every {run.knn_every_epochs} epochs", why["knn_every_epochs"]))
    rows.append(("speed", f"{rate.images_per_second:.0f} images a second", "measured over a few steps"))
    rows.append(
        (
            "memory",
            f"{predicted_memory / 2**30:.2f} GB predicted, {rate.peak_memory / 2**30:.2f} GB measured",
            f"of {machine.memory / 2**30:.1f} GB",
        )
    )
    rows.append(("time", words(seconds), f"of the {words(budget)} given"))
    head = f"Plan for {images.count:,} images of about {images.height} x {images.width} pixels on {machine.name}:"
    return f"{head}\n{_aligned(rows)}\nAny value can be given as a flag; the rest adapts to it."


def _aligned(rows: Sequence[tuple[str, str, str]]) -> str:
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {name:<{first}}  {value:<{second}}  {why}" for name, value, why in rows)
