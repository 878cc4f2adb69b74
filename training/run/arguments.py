"""Flags of a run, with their defaults. Imports nothing heavy: the command line reads them before torch is there."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.objectives.combined import WEIGHTS
from hf_vicreg.training.objectives.registry import ENTRIES, OBJECTIVE_SECTIONS

SECONDS = {r"d(?:ays?)?": 86400, r"h(?:(?:ou)?rs?)?": 3600, r"m(?:in(?:ute)?s?)?": 60, r"s(?:ec(?:ond)?s?)?": 1}
TIME = re.compile(r"\s*".join(rf"(?:(\d+)\s*{unit})?" for unit in SECONDS))
BYTES = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def seconds_of(text: str, name: str = "time_budget") -> float:
    """Return a time like `90s`, `15m`, `2h`, `1d`, `1h30m` or `2 minutes` in seconds.

    Raises:
        InputError: Anything else, or no time at all.
    """
    found = TIME.fullmatch(text.strip().lower())
    seconds = (
        sum(int(one or 0) * SECONDS[unit] for one, unit in zip(found.groups(), SECONDS, strict=True)) if found else 0
    )
    if not seconds:
        raise InputError(f"`{name}`: expected a time like 90s, 15m, 2h, 1d or 1h30m, got {text!r}.")
    return float(seconds)


def bytes_of(text: str, name: str = "max_memory") -> int:
    """Return a size of memory like `512m`, `4g` or `1.5g` in bytes.

    Raises:
        InputError: Anything else, or no memory at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt])(?:i?b)?", text.strip().lower())
    size = int(float(found[1]) * BYTES[found[2]]) if found else 0
    if not size:
        raise InputError(f"`{name}`: expected memory like 512m or 4g, got {text!r}.")
    return size


def _option(group: str, default: Any, text: str) -> Any:
    shown = text if default is None or default is False or default == "" else f"{text} (default: {default})"
    return field(default=default, metadata={"help": shown, "group": group})


_data, _model, _loss, _views, _optimisation, _run, _evaluation, _hub = (
    partial(_option, group) for group in ("data", "model", "loss", "views", "optimisation", "run", "evaluation", "Hub")
)


@dataclass
class ViewsConfig:
    """Augmentation of the views, all drawn alike by default. The defaults are the paper's (VICReg, appendix C.1).

    Blur and solarisation may be pairs, one probability for each of two views; `preset` stands for several: see
    `VIEW_PRESETS`. Local views are those of multi-crop (Caron et al. 2020, arXiv 2006.09882), their crops' areas
    DINO's (arXiv 2104.14294).
    """

    image_size: int | tuple[int, int] | None = _views(
        None, "Size of the views in pixels, or (height, width); default: the encoder's."
    )
    crop_min_ratio: float = _views(0.08, "Smallest crop, as a share of the image's area.")
    flip_probability: float = _views(0.5, "Horizontal flip.")
    vertical_flip_probability: float = _views(0.0, "Vertical flip.")
    quarter_turn_probability: float = _views(0.0, "Turn by 90, 180 or 270 degrees.")
    rotation_degrees: float = _views(0.0, "Rotation by up to so many degrees either way, before the crop.")
    translate_ratio: float = _views(0.0, "Shift by up to this share of the image each way, before the crop.")
    zoom_ratio: float = _views(0.0, "Magnification drawn from 1 +- this, before the crop.")
    jitter_probability: float = _views(0.8, "Colour jitter.")
    brightness: float = _views(0.4, "Factor drawn from 1 +- this.")
    contrast: float = _views(0.4, "Factor drawn from 1 +- this.")
    saturation: float = _views(0.2, "Factor drawn from 1 +- this.")
    hue: float = _views(0.1, "Shift drawn from +- this, in turns.")
    grayscale_probability: float = _views(0.2, "Grayscale.")
    blur_probability: float | tuple[float, float] = _views(0.5, "Gaussian blur, sigma 0.1 to 2 pixels at 224 pixels.")
    solarize_probability: float | tuple[float, float] = _views(0.1, "Solarisation above one half.")
    gain: float = _views(0.0, "Factor of each channel, drawn from 1 +- this.")
    offset: float = _views(0.0, "Summand of each channel, drawn from +- this, of values between 0 and 1.")
    gamma: float = _views(0.0, "Exponent of each channel, drawn from 1 / (1 + this) to 1 + this.")
    noise: float = _views(0.0, "Normal noise, its deviation drawn from 0 to this.")
    channel_dropout_probability: float = _views(0.0, "Each channel is replaced by its mean.")
    stain: float = _views(0.0, "Amounts of stains in RGB, in optical density: factor 1 +- this, summand +- this.")
    num_local_views: int = _views(0, "Smaller crops beside the two global views (multi-crop).")
    local_image_size: int = _views(96, "Side of local views in pixels.")
    local_crop_min_ratio: float = _views(0.05, "Smallest crop of a local view, as a share of the image's area.")
    local_crop_max_ratio: float = _views(0.4, "Largest crop of a local view.")
    image_mean: float | tuple[float, ...] | None = _views(
        None, "Taken from pixels in [0, 1], of all channels or each; default: the source's, else ImageNet's."
    )
    image_std: float | tuple[float, ...] | None = _views(
        None, "What they are divided by then; default: the source's, else ImageNet's."
    )
    channel_low: float | tuple[float, ...] | None = _views(
        None, "Value of each channel that becomes 0; default: none for photographs, else measured."
    )
    channel_high: float | tuple[float, ...] | None = _views(
        None, "Value of each channel that becomes 1; default: none for photographs, else measured."
    )

    def __post_init__(self) -> None:
        ranges = {
            "rotation_degrees": (0, 180),
            "hue": (0, 0.5),
            "zoom_ratio": (0, 0.9),
            "num_local_views": (0, 64),
            "local_image_size": (1, math.inf),
            "image_mean": (-1000, 1000),
            "image_std": (1e-6, 1000),
            "channel_low": (-1e30, 1e30),
            "channel_high": (-1e30, 1e30),
        }
        for name, value in dataclasses.asdict(self).items():
            if name == "image_size":
                if value is not None and not all(
                    one >= 1 for one in (value if isinstance(value, tuple) else (value,))
                ):
                    raise InputError(f"`views.image_size`: expected at least 1 pixel, got {value}.")
                continue
            low, high = ranges.get(name, (0, 1))
            for one in value if isinstance(value, tuple) else () if value is None else (value,):
                if not low <= one <= high:
                    raise InputError(f"`views.{name}`: expected a number from {low} to {high}, got {value}.")
        if not 0 < self.local_crop_max_ratio >= self.local_crop_min_ratio:
            raise InputError(
                "`views.local_crop_max_ratio`: expected a number above 0 and at least `local_crop_min_ratio`, "
                f"{self.local_crop_min_ratio}, got {self.local_crop_max_ratio}."
            )


@dataclass
class PretrainArguments:
    """Flags of a run. Sections of the recipe have dotted flags: `--model.KEY`, `--second_model.KEY`,
    `--vicreg.KEY`, `--views.KEY`, `--OBJECTIVE.KEY`. Each names its group, under which `--help` lists it.
    """

    output_dir: str = _run(
        "",
        "Folder of the run: encoder, processor and card at its root, checkpoints inside; default: runs/NAME-DATE, "
        "named after the images.",
    )
    dataset_name: str | None = _data(
        None,
        "Hub id, local `datasets` folder, `digits` (built in), or shards: `shards/{000..123}.tar`, of any store.",
    )
    dataset_config_name: str | None = _data(None, "Configuration of the Hub dataset.")
    train_dir: str | None = _data(None, "Folder of image files, searched recursively; no labels are needed.")
    streaming: bool = _data(False, "Read the dataset as it comes, without storing it; needs `max_steps`.")
    train_split: str = _data("train", "Split to train on.")
    test_split: str | None = _data(None, "Labelled split for k-NN; default: `test` or `validation` if there is one.")
    image_column_name: str | None = _data(None, "Column of images; default: the only image column.")
    label_column_name: str | None = _data(None, "Column of labels for k-NN; default: `label` if there is one.")
    max_train_samples: int | None = _data(None, "Train on the first so many images.")
    caption_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of captions, texts or lists of them: images are then trained with their captions.",
            "group": "data",
        },
    )
    max_text_length: int = _data(64, "Longest caption in tokens; longer ones are cut.")
    normalisation: list[str] | None = _data(  # noqa: RUF009 - the default is None
        None,
        "How values of each channel become 0 to 1: `photo` (8-bit RGB), or as measured on the images by `percentile`, "
        "`minmax`, or `fixed LOW HIGH`; default: photo for 3 channels, else percentile.",
    )
    pages: str | None = _data(
        None, "What pages of a file are, `channels` or `images`; default: told from the number of channels."
    )
    window: int | None = _data(None, "Read larger images by windows of so many pixels a side, each an image.")
    model_name_or_path: str | None = _model(
        None, "Begin with the weights of a vision encoder: a run's folder, any that transformers loads, or a Hub id."
    )
    text_model: str | None = _model(
        None,
        "Begin with the weights and the tokenizer of a text encoder, a folder or Hub id; default: a small new "
        "DistilBERT, or --second_model.KEY, and a tokenizer made from the captions.",
    )
    freeze_text: bool = _model(False, "Keep the encoder of `text_model` as it is; its expander learns.")
    sparse: bool = _model(False, "Make the ViT, DINOv2 or DINOv3 of `model_name_or_path` a BigBirdViT.")
    objective: str = _loss("vicreg", f"What is learned: {', '.join(ENTRIES)}; or several, with + between.")
    teacher: str | None = _loss(
        None, "Let the encoder predict the features of a frozen one, too: a run's folder, any that transformers loads."
    )
    teacher_features: str | None = _loss(None, "Predict the features in the FOLDER of `embed IMAGES TEACHER FOLDER`.")
    teacher_weight: float = _loss(25.0, "Weight of the error of that.")
    batch_size: int = _loss(256, "Images at once over all processes; a step and the loss's batch.")
    statistics_batch_size: int | None = _loss(
        None, "Images a step where that is more than go at once: a multiple of `batch_size`, in two passes."
    )
    per_device_train_batch_size: int | None = _loss(None, "Images a step and process; replaces `batch_size`.")
    num_train_epochs: int = _optimisation(100, "Passes over the images; the last batch of a pass is dropped if short.")
    max_steps: int | None = _optimisation(None, "Stop the schedule at this step instead of `num_train_epochs`.")
    optim: str = _optimisation("adamw", "`adamw`, or `lars` as in the authors' code: for convolutional encoders.")
    learning_rate: float = _optimisation(5e-4, "Peak learning rate, as it is: not scaled by the batch.")
    min_learning_rate: float = _optimisation(0.0, "Learning rate at the end of the cosine.")
    weight_decay: float = _optimisation(0.05, "Decay (AdamW's is decoupled); biases, norms and tokens are exempt.")
    adam_beta1: float = _optimisation(0.9, "AdamW's first beta.")
    adam_beta2: float = _optimisation(0.95, "AdamW's second beta.")
    warmup_ratio: float = _optimisation(0.1, "Share of the steps with linear warm-up; then a cosine.")
    layer_decay: float = _optimisation(
        1.0, "Factor on the learning rate from one of the encoder's layers to the one before; 1 turns it off."
    )
    expander_lr_scale: float = _optimisation(
        1.0, "Factor on the learning rate of the expander, which is wider than the encoder; 1 turns it off."
    )
    freeze_layers: int = _optimisation(
        0, "Keep embeddings and so many first layers of `model_name_or_path` as they are; 0: all learn."
    )
    lora_rank: int = _optimisation(
        0, "Train low-rank adapters of `model_name_or_path` in place of its weights; 0: all weights learn."
    )
    expander_warmup_ratio: float = _optimisation(
        0.0, "Share of the steps, before all others, that train the expander alone on `model_name_or_path`."
    )
    max_grad_norm: float = _optimisation(3.0, "Clip the norm of the encoder's gradient; 0 turns it off.")
    max_skipped_steps: int = _optimisation(
        20, "Stop after so many steps in a row whose loss or gradient is not finite."
    )
    ema_decay: float = _optimisation(
        0.0, "Decay of an exponential moving average of the encoder's weights, which is exported; 0 turns it off."
    )
    mixed_precision: str = _optimisation("auto", "`auto` (bf16 where the device has it), `bf16`, `fp16` or `no`.")
    gradient_checkpointing: bool = _model(False, "Recompute the encoder's layers backward: less memory, more time.")
    attn_implementation: str | None = _model(
        None,
        "Form of attention: `auto` times those that this device has, `sdpa`, `eager` or, on GPUs, `flex_attention`; "
        "default: `auto` on a GPU, else `sdpa`.",
    )
    shard_weights: bool = _model(False, "Share weights and AdamW's moments over the processes (FSDP2): less memory.")
    dp_shard_size: int | None = _model(None, "Processes that share one copy of the weights (HSDP); default: all.")
    torch_compile: bool = _model(False, "Compile the encoder, and only it, with torch.compile.")
    dataloader_num_workers: int | None = _run(None, "Loader processes; default: 0 on a CPU, else up to 8.")
    logging_steps: int = _run(10, "Steps between lines of log.jsonl.")
    checkpointing_steps: int = _run(500, "Steps between checkpoints; one more at the end.")
    checkpoints_total_limit: int = _run(2, "Newest checkpoints to keep.")
    checkpoints_keep_every_steps: int | None = _run(None, "Keep checkpoints of multiples of this for good, too.")
    resume_from_checkpoint: str | None = _run(None, "`latest`, or a folder below `output_dir`/checkpoints.")
    max_time: float | None = _run(None, "Minutes after which this launch checkpoints and stops, exit code 75.")
    knn_every_epochs: int = _evaluation(
        10, "Epochs between k-NN measurements, where labels exist; 0: at the ends only."
    )
    knn_neighbours: int = _evaluation(20, "k of the k-NN.")
    knn_train_samples: int = _evaluation(10_000, "Bank: so many training images, of every class.")
    knn_test_samples: int = _evaluation(2_000, "Queries: so many test images, of every class.")
    linear_probe: bool = _evaluation(False, "Beside each k-NN, a logistic regression on the same features.")
    with_tracking: bool = _run(False, "Send what log.jsonl holds to the trackers of `report_to` as well.")
    report_to: str = _run("all", "`tensorboard`, `wandb`, or `all`: those that are installed.")
    push_to_hub: bool = _hub(False, "Publish the encoder on the Hub, as `hf-vicreg publish` does.")
    hub_model_id: str | None = _hub(None, "Repository to publish to, OWNER/NAME; made if there is none.")
    hub_strategy: str = _hub("end", "`end`: the finished run; `checkpoint`: every checkpoint, too, in the background.")
    hub_private_repo: bool = _hub(False, "Make a new repository private; default: as its owner's new ones are.")
    device: str = _run("auto", "`auto` (a GPU if there is one), `cpu`, `cuda` or `mps`.")
    time_budget: str | None = _run(
        None, "How long the run may take: 90s, 15m, 2h, 1d, 1h30m; default of a planned run: 3h."
    )
    max_memory: str | None = _run(None, "Memory the run may take on its device: 512m, 4g; default: what is free.")
    plan_only: bool = _run(False, "Print the plan of the run and leave; nothing is written.")
    seed: int = _run(0, "Seed of weights, order and augmentation.")


SECTIONS = ("model", "second_model", "vicreg", "views", WEIGHTS, *OBJECTIVE_SECTIONS)
# Fields of an encoder that leave the weights of `model_name_or_path` as they are.
OPEN_FIELDS = {
    "num_channels",
    "image_size",
    "drop_path_rate",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "pooling",
    "attention_type",
    "attention_layout",
    "tile_size",
    "block_size",
    "window_size",
    "num_random_blocks",
    "num_global_tiles",
    "attention_seed",
}
# Not the run's to set: how a model is called, stored or used as a backbone. And encoders have sections of their own.
RESERVED = {
    "return_dict",
    "output_hidden_states",
    "dtype",
    "encoder",
    "second_encoder",
    "objective",
    "objective_settings",
    "stage_names",
    "out_features",
    "out_indices",
}
