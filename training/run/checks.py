"""Whether a run's settings make sense by themselves and together."""

import math
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.run.arguments import PretrainArguments, bytes_of, seconds_of
from hf_vicreg.training.run.places import is_shards, refuse_credentials

if TYPE_CHECKING:
    from hf_vicreg.training.run.config import RunConfig

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MAX_CHANNELS = 64
NORMALISATIONS = ("photo", "percentile", "minmax", "fixed")
MAX_SEED = 2**32 - 1001  # every process adds its rank, and numpy takes 32 bits


def check_ranges(run: PretrainArguments, given: Collection[str] | None = None) -> None:
    """Raise InputError for a flag out of its range, or flags that contradict each other.

    Args:
        run: The flags.
        given: Those that were chosen; the others may yet be fitted to them, so that they contradict nothing. Default:
            all.
    """
    at_least = {
        "num_train_epochs": 1,
        "max_steps": 1,
        "max_train_samples": 1,
        "learning_rate": 0,
        "min_learning_rate": 0,
        "weight_decay": 0,
        "warmup_ratio": 0,
        "freeze_layers": 0,
        "teacher_weight": 0,
        "lora_rank": 0,
        "expander_warmup_ratio": 0,
        "max_grad_norm": 0,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 1,
        "checkpoints_keep_every_steps": 1,
        "dp_shard_size": 1,
        "max_time": 0,
        "max_text_length": 2,
        "max_skipped_steps": 1,
        "knn_every_epochs": 0,
        "knn_neighbours": 1,
        "knn_train_samples": 1,
        "knn_test_samples": 1,
        "window": 16,
    }
    for name, least in at_least.items():
        value = getattr(run, name)
        if value is not None and not value >= least:
            raise InputError(f"`{name}`: expected at least {least}, got {value}.")
    for name in ("batch_size", "per_device_train_batch_size"):
        value = getattr(run, name)
        least, reason = (2, "2 images for a covariance") if name == "batch_size" else (1, "1 image")
        if value is not None and value < least:
            raise InputError(f"`{name}`: expected at least {reason}, got {value}; raise it.")
    if _all_of(given, "batch_size", "statistics_batch_size") and run.per_device_train_batch_size is None:
        check_statistics_batch(run)
    if run.learning_rate == math.inf:
        raise InputError("`learning_rate`: expected a finite number, got inf.")
    if _all_of(given, "min_learning_rate", "learning_rate") and run.min_learning_rate > run.learning_rate:
        raise InputError(
            f"`min_learning_rate`: expected at most `learning_rate` {run.learning_rate}, got {run.min_learning_rate}."
        )
    kept = run.checkpoints_keep_every_steps
    if _all_of(given, "checkpoints_keep_every_steps", "checkpointing_steps") and (kept or 0) % run.checkpointing_steps:
        raise InputError(
            f"`checkpoints_keep_every_steps`: expected a multiple of the {run.checkpointing_steps} "
            f"`checkpointing_steps`, got {run.checkpoints_keep_every_steps}."
        )
    if not 0 < run.expander_lr_scale < math.inf:
        raise InputError(f"`expander_lr_scale`: expected a factor above 0, got {run.expander_lr_scale}.")
    if run.warmup_ratio > 1:
        raise InputError(f"`warmup_ratio`: expected a share of the steps from 0 to 1, got {run.warmup_ratio}.")
    if not 0 <= run.seed <= MAX_SEED:
        raise InputError(f"`seed`: expected an integer from 0 to {MAX_SEED}, got {run.seed}.")
    for name in ("adam_beta1", "adam_beta2", "ema_decay"):
        if not 0 <= getattr(run, name) < 1:
            raise InputError(f"`{name}`: expected a number in [0, 1), got {getattr(run, name)}.")
    if run.mixed_precision not in ("auto", "bf16", "fp16", "no"):
        raise InputError(f"`mixed_precision`: expected 'auto', 'bf16', 'fp16' or 'no', got {run.mixed_precision!r}.")
    if run.optim not in ("adamw", "lars"):
        raise InputError(f"`optim`: expected 'adamw' or 'lars', got {run.optim!r}.")
    if run.hub_strategy not in ("end", "checkpoint"):
        raise InputError(f"`hub_strategy`: expected 'end' or 'checkpoint', got {run.hub_strategy!r}.")
    if run.push_to_hub and not REPO.fullmatch(run.hub_model_id or ""):
        raise InputError(f"`hub_model_id`: expected OWNER/NAME with --push_to_hub, got {run.hub_model_id!r}.")
    if run.device not in ("auto", "cpu", "cuda", "mps"):
        raise InputError(f"`device`: expected 'auto', 'cpu', 'cuda' or 'mps', got {run.device!r}.")
    if run.time_budget is not None:
        seconds_of(run.time_budget)
    if run.max_memory is not None:
        bytes_of(run.max_memory)
    if run.pages not in (None, "channels", "images"):
        raise InputError(f"`pages`: expected 'channels' or 'images', got {run.pages!r}.")
    fixed_bounds(run.normalisation)
    if run.dataset_name and run.train_dir:
        raise InputError("`dataset_name`, `train_dir`: expected one of the two, got both.")
    if not run.dataset_name and not run.train_dir:
        raise InputError(
            "`dataset_name`, `train_dir`: expected one of the two, got none; name your images: pretrain DATA."
        )
    check_warm_start(run)
    check_captions(run)
    check_shards(run)
    check_shared_weights(run)
    if run.streaming:
        if run.dataset_name in (None, "digits"):
            raise InputError("`streaming`: expected a dataset to stream; name a Hub id or a folder of parquet shards.")
        if run.max_steps is None:
            raise InputError("`max_steps`: expected a number of steps, a stream has no epochs; add --max_steps N.")
        for name in ("max_train_samples", "test_split"):
            if getattr(run, name) is not None:
                raise InputError(f"`{name}`: expected none with --streaming, which reads the train split alone.")


def check_shards(run: PretrainArguments) -> None:
    """Raise InputError for shards that are not streamed, or whose address holds what nobody should read."""
    if run.train_dir and is_shards(run.train_dir):
        raise InputError("`train_dir`: expected a folder of images, got shards; name them by --dataset_name.")
    if run.dataset_name is None or not is_shards(run.dataset_name):
        return
    refuse_credentials(run.dataset_name, "dataset_name")
    if not run.streaming:
        raise InputError("`streaming`: expected it with shards, which are read as they come; add --streaming.")
    if run.image_column_name is not None and run.dataset_name.lower().endswith(".tar"):
        raise InputError("`image_column_name`: expected none with tars, which have no columns; leave it out.")
    for name in ("label_column_name", "dataset_config_name", "caption_column"):
        if getattr(run, name) is not None:
            raise InputError(f"`{name}`: expected none with shards, of which only images are read; leave it out.")


def check_shared_weights(run: PretrainArguments) -> None:
    """Raise InputError for what cannot be had while weights are shared out over the processes."""
    if not run.shard_weights:
        if run.dp_shard_size is not None:
            raise InputError("`dp_shard_size`: expected `shard_weights` beside it, got none; add --shard_weights.")
        return
    beside = {
        "torch_compile": "false",
        "freeze_layers": "0",
        "expander_warmup_ratio": "0",
        "lora_rank": "0",
        "teacher": "none",
        "teacher_features": "none",
        "caption_column": "none",
    }
    for name, wanted in beside.items():
        if getattr(run, name):
            raise InputError(
                f"`{name}`: expected {wanted} with --shard_weights, got {getattr(run, name)!r}; leave one of them out."
            )
    for name, wanted in (("optim", "adamw"), ("hub_strategy", "end")):
        if getattr(run, name) != wanted:
            raise InputError(
                f"`{name}`: expected {wanted!r} with --shard_weights, got {getattr(run, name)!r}; leave one out."
            )
    if run.mixed_precision == "fp16":
        raise InputError("`mixed_precision`: expected 'bf16' or 'no' with --shard_weights, got 'fp16'.")


def check_warm_start(run: PretrainArguments) -> None:
    """Raise InputError for flags of a warm start that are out of range, or that stand without a source."""
    if not 0 < run.layer_decay <= 1:
        raise InputError(f"`layer_decay`: expected a factor above 0 and at most 1, got {run.layer_decay}.")
    if run.expander_warmup_ratio >= 1:
        raise InputError(
            f"`expander_warmup_ratio`: expected a share of the steps below 1, got {run.expander_warmup_ratio}."
        )
    reasons = {
        "sparse": "a new encoder is sparse by itself",
        "freeze_layers": "layers of a new encoder have to learn",
        "lora_rank": "the weights of a new encoder have to learn",
        "expander_warmup_ratio": "a new encoder has to learn from the start",
    }
    if run.teacher and run.teacher_features:
        raise InputError("`teacher`, `teacher_features`: expected one of the two, got both; leave one out.")
    if run.teacher_features and (run.streaming or run.caption_column):
        raise InputError("`teacher_features`: expected stored images without captions beside it; use --teacher MODEL.")
    if run.teacher is run.teacher_features is None and run.teacher_weight != PretrainArguments.teacher_weight:
        raise InputError("`teacher_weight`: expected a `teacher` beside it, got none; add --teacher MODEL.")
    for name, reason in reasons.items():
        if getattr(run, name) and not run.model_name_or_path:
            raise InputError(f"`{name}`: expected a `model_name_or_path` beside it, got none; {reason}: leave it out.")


def check_captions(run: PretrainArguments) -> None:
    """Raise InputError for flags of captions that do not go together."""
    for name in ("text_model", "freeze_text"):
        if getattr(run, name) and run.caption_column is None:
            raise InputError(f"`{name}`: expected a `caption_column` beside it, got none; add --caption_column NAME.")
    if run.freeze_text and not run.text_model:
        raise InputError("`freeze_text`: expected a `text_model` beside it; a new encoder has to learn: leave it out.")
    if run.caption_column is not None and (run.streaming or run.dataset_name == "digits"):
        what = "a data set that is not streamed" if run.streaming else "images with captions, not the digits"
        raise InputError(f"`caption_column`: expected {what}; leave one of the two out.")
    if run.caption_column is not None and not run.caption_column:
        raise InputError("`caption_column`: expected at least one column, got none.")


def _all_of(given: Collection[str] | None, *names: str) -> bool:
    return given is None or all(name in given for name in names)


def check_statistics_batch(run: PretrainArguments) -> None:
    """Check the batch of the loss against the batch that goes through the encoder at once.

    Raises:
        InputError: It is no multiple.
    """
    whole = run.statistics_batch_size
    if whole is not None and (whole < run.batch_size or whole % run.batch_size):
        raise InputError(
            f"`statistics_batch_size`: expected a multiple of the batch size {run.batch_size}, got {whole}."
        )


def check_local_views(config: "RunConfig") -> None:
    """Raise InputError for local views that are not small, or beside what cannot go with them."""
    views = config.views
    if not views.num_local_views:
        return
    if config.vicreg.second_encoder is not None:
        raise InputError(
            f"`views.num_local_views`: expected 0 with a second encoder, got {views.num_local_views}; each of two "
            "branches sees one view."
        )
    for name in ("variance_weight", "covariance_weight"):
        weight = getattr(config.vicreg, name)
        if not isinstance(weight, int | float) and len(set(weight)) > 1:
            raise InputError(f"`vicreg.{name}`: expected one number beside local views, got {list(weight)}.")
    if views.local_image_size >= min(config.image_size):
        raise InputError(
            f"`views.local_image_size`: expected less than the image size {config.image_size}, "
            f"got {views.local_image_size}."
        )


def check_channels(config: "RunConfig") -> None:
    """Raise InputError for a normalisation, pages or a window that the images cannot be read by."""
    run, views, channels = config.run, config.views, config.num_channels
    second = getattr(config.vicreg.second_encoder, "num_channels", channels)
    if second != channels:
        raise InputError(f"`second_model.num_channels`: expected {channels} as the first encoder's, got {second}.")
    if config.normalisation_kind == "photo" and channels != 3:
        raise InputError(
            f"`normalisation`: expected percentile, minmax or fixed LOW HIGH with {channels} channels, got photo, "
            "which is of RGB; leave it out."
        )
    if config.vicreg.image_pair_weight and run.caption_column is None:
        raise InputError("`vicreg.image_pair_weight`: expected 0 without captions: leave it out.")
    if run.window is not None and (not run.train_dir or run.caption_column is not None):
        raise InputError(f"`window`: expected a folder of image files to read by windows, got {run.dataset_name!r}.")
    if views.stain and channels != 3:
        raise InputError(f"`views.stain`: expected 0 with {channels} channels, got {views.stain}: stains are of RGB.")
    for name in ("image_mean", "image_std", "channel_low", "channel_high"):
        given = getattr(views, name)
        if isinstance(given, tuple) and len(given) != channels:
            count = {3: "three"}.get(channels, channels)
            raise InputError(f"`views.{name}`: expected a number, or {count} for the channels, got {list(given)}.")
    ranges = config.channel_ranges
    if ranges is not None and any(low >= high for low, high in zip(*ranges, strict=True)):
        raise InputError("`views.channel_high`: expected more than `views.channel_low` in every channel.")


def fixed_bounds(normalisation: list[str] | None) -> tuple[float, float] | None:
    """Return low and high of `fixed LOW HIGH`; None for the other normalisations.

    Raises:
        InputError: None of them.
    """
    words = " ".join(normalisation or ["photo"]).split()  # given as one text or as several
    if words[0] not in NORMALISATIONS or len(words) != (3 if words[0] == "fixed" else 1):
        raise InputError(
            f"`normalisation`: expected photo, percentile, minmax or fixed LOW HIGH, got {' '.join(words)!r}."
        )
    if words[0] != "fixed":
        return None
    try:
        low, high = (float(one) for one in words[1:])
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise InputError(f"`normalisation`: expected fixed LOW HIGH with LOW below HIGH, got {' '.join(words)!r}.")
    return low, high
