"""What a run is made of: its flags with their defaults, its views, its encoders."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from hf_vicreg.modeling.configuration_vicreg import VicRegConfig
from hf_vicreg.training.errors import InputError


def _option(default: Any, text: str) -> Any:
    shown = text if default is None or default == "" else f"{text} (default: {default})"
    return field(default=default, metadata={"help": shown})


@dataclass
class ViewsConfig:
    """Augmentation of the views, all drawn alike by default. The defaults are the paper's (VICReg, appendix C.1).

    Blur and solarisation may be pairs, one probability for each of two views; `preset` in a recipe stands for the two:
    see `VIEW_PRESETS`. Local views are those of multi-crop (Caron et al. 2020, arXiv 2006.09882), their crops' areas
    DINO's (arXiv 2104.14294).
    """

    crop_min_ratio: float = _option(0.08, "Smallest crop, as a share of the image's area.")
    flip_probability: float = _option(0.5, "Horizontal flip.")
    rotation_degrees: float = _option(0.0, "Rotation by up to so many degrees either way, before the crop.")
    translate_ratio: float = _option(0.0, "Shift by up to this share of the image each way, before the crop.")
    zoom_ratio: float = _option(0.0, "Magnification drawn from 1 +- this, before the crop.")
    jitter_probability: float = _option(0.8, "Colour jitter.")
    brightness: float = _option(0.4, "Factor drawn from 1 +- this.")
    contrast: float = _option(0.4, "Factor drawn from 1 +- this.")
    saturation: float = _option(0.2, "Factor drawn from 1 +- this.")
    hue: float = _option(0.1, "Shift drawn from +- this, in turns.")
    grayscale_probability: float = _option(0.2, "Grayscale.")
    blur_probability: float | tuple[float, float] = _option(0.5, "Gaussian blur, sigma 0.1 to 2 pixels at 224 pixels.")
    solarize_probability: float | tuple[float, float] = _option(0.1, "Solarisation above one half.")
    num_local_views: int = _option(0, "Smaller crops beside the two global views (multi-crop).")
    local_image_size: int = _option(96, "Side of local views in pixels.")
    local_crop_min_ratio: float = _option(0.05, "Smallest crop of a local view, as a share of the image's area.")
    local_crop_max_ratio: float = _option(0.4, "Largest crop of a local view.")

    def __post_init__(self) -> None:
        ranges = {
            "rotation_degrees": (0, 180),
            "hue": (0, 0.5),
            "zoom_ratio": (0, 0.9),
            "num_local_views": (0, 64),
            "local_image_size": (1, math.inf),
        }
        for name, value in dataclasses.asdict(self).items():
            low, high = ranges.get(name, (0, 1))
            for one in value if isinstance(value, tuple) else (value,):
                if not low <= one <= high:
                    raise InputError(f"`views.{name}`: expected a number from {low} to {high}, got {value}.")
        if not 0 < self.local_crop_max_ratio >= self.local_crop_min_ratio:
            raise InputError(
                "`views.local_crop_max_ratio`: expected a number above 0 and at least `local_crop_min_ratio`, "
                f"{self.local_crop_min_ratio}, got {self.local_crop_max_ratio}."
            )


# `views.preset`: what differs between the paper and its code (facebookresearch/vicreg, augmentations.py).
VIEW_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"blur_probability": 0.5, "solarize_probability": 0.1},
    "official": {"blur_probability": (1.0, 0.1), "solarize_probability": (0.0, 0.2)},
}


@dataclass
class PretrainArguments:
    """Flags of a run. Sections of the recipe have dotted flags: `--model.KEY`, `--second_model.KEY`,
    `--vicreg.KEY`, `--views.KEY`.
    """

    output_dir: str = _option("", "Folder of the run: encoder, processor and card at its root, checkpoints inside.")
    dataset_name: str | None = _option(None, "Hub id, local `datasets` folder, or `digits` (built in).")
    dataset_config_name: str | None = _option(None, "Configuration of the Hub dataset.")
    train_dir: str | None = _option(None, "Folder of image files, searched recursively; no labels are needed.")
    streaming: bool = _option(False, "Read the dataset as it comes, without storing it; needs `max_steps`.")
    train_split: str = _option("train", "Split to train on.")
    test_split: str | None = _option(None, "Labelled split for k-NN; default: `test` or `validation` if there is one.")
    image_column_name: str | None = _option(None, "Column of images; default: the only image column.")
    label_column_name: str | None = _option(None, "Column of labels for k-NN; default: `label` if there is one.")
    max_train_samples: int | None = _option(None, "Train on the first so many images.")
    batch_size: int = _option(256, "Images at once over all processes; a step and the loss's batch.")
    statistics_batch_size: int | None = _option(
        None, "Images a step where that is more than go at once: a multiple of `batch_size`, in two passes."
    )
    per_device_train_batch_size: int | None = _option(None, "Images a step and process; replaces `batch_size`.")
    num_train_epochs: int = _option(100, "Passes over the images; the last batch of a pass is dropped if short.")
    max_steps: int | None = _option(None, "Stop the schedule at this step instead of `num_train_epochs`.")
    optim: str = _option("adamw", "`adamw`, or `lars` as in the authors' code: for convolutional encoders.")
    learning_rate: float = _option(5e-4, "Peak learning rate, as it is: not scaled by the batch.")
    min_learning_rate: float = _option(0.0, "Learning rate at the end of the cosine.")
    weight_decay: float = _option(0.05, "Decay (AdamW's is decoupled); biases, norms and tokens are exempt.")
    adam_beta1: float = _option(0.9, "AdamW's first beta.")
    adam_beta2: float = _option(0.95, "AdamW's second beta.")
    warmup_ratio: float = _option(0.1, "Share of the steps with linear warm-up; then a cosine.")
    max_grad_norm: float = _option(3.0, "Clip the norm of the encoder's gradient; 0 turns it off.")
    max_skipped_steps: int = _option(20, "Stop after so many steps in a row whose loss or gradient is not finite.")
    mixed_precision: str = _option("auto", "`auto` (bf16 where the device has it), `bf16`, `fp16` or `no`.")
    gradient_checkpointing: bool = _option(False, "Recompute the encoder's layers backward: less memory, more time.")
    torch_compile: bool = _option(False, "Compile the encoder, and only it, with torch.compile.")
    dataloader_num_workers: int | None = _option(None, "Loader processes; default: 0 on a CPU, else up to 8.")
    logging_steps: int = _option(10, "Steps between lines of log.jsonl.")
    checkpointing_steps: int = _option(500, "Steps between checkpoints; one more at the end.")
    checkpoints_total_limit: int = _option(2, "Newest checkpoints to keep.")
    checkpoints_keep_every_steps: int | None = _option(None, "Keep checkpoints of multiples of this for good, too.")
    resume_from_checkpoint: str | None = _option(None, "`latest`, or a folder below `output_dir`/checkpoints.")
    max_time: float | None = _option(None, "Minutes after which this launch checkpoints and stops, exit code 75.")
    knn_every_epochs: int = _option(10, "Epochs between k-NN measurements, where labels exist; 0: at the ends only.")
    knn_neighbours: int = _option(20, "k of the k-NN.")
    knn_train_samples: int = _option(10_000, "Bank: the first so many training images.")
    knn_test_samples: int = _option(2_000, "Queries: the first so many test images.")
    linear_probe: bool = _option(False, "Beside each k-NN, a logistic regression on the same features.")
    with_tracking: bool = _option(False, "Send what log.jsonl holds to the trackers of `report_to` as well.")
    report_to: str = _option("all", "`tensorboard`, `wandb`, or `all`: those that are installed.")
    push_to_hub: bool = _option(False, "Publish the encoder on the Hub, as `hf-vicreg publish` does.")
    hub_model_id: str | None = _option(None, "Repository to publish to, OWNER/NAME; made if there is none.")
    hub_strategy: str = _option(
        "end", "`end`: the finished run; `checkpoint`: every checkpoint, too, in the background."
    )
    hub_private_repo: bool = _option(False, "Make a new repository a private one.")
    seed: int = _option(0, "Seed of weights, order and augmentation.")


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
    "knn_every_epochs",
    "linear_probe",
    "with_tracking",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "per_device_train_batch_size",  # resolved into batch_size
}

SECTIONS = ("model", "second_model", "vicreg", "views")
# Not the run's to set: how a model is called, stored or used as a backbone. And encoders have sections of their own.
RESERVED = {
    "return_dict",
    "output_hidden_states",
    "dtype",
    "encoder",
    "second_encoder",
    "stage_names",
    "out_features",
    "out_indices",
}


@dataclass
class RunConfig:
    """Everything a run is made of."""

    run: PretrainArguments
    views: ViewsConfig
    vicreg: VicRegConfig  # holds the encoder's configuration

    @property
    def image_size(self) -> tuple[int, int]:
        """Size of the views, (height, width) in pixels; 224 for encoders that name none."""
        size = getattr(self.vicreg.encoder, "image_size", None) or 224
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def step_size(self) -> int:
        """Images a step over all processes: the batch of the loss."""
        return self.run.statistics_batch_size or self.run.batch_size

    def to_recipe(self) -> dict[str, Any]:
        """Return the plain, complete dictionary that `recipe.yaml` stores and `--config` reads again."""
        bookkeeping = {"transformers_version", "architectures", "auto_map", *RESERVED}
        model, second, vicreg = (
            {name: value for name, value in config.to_diff_dict().items() if name not in bookkeeping} if config else {}
            for config in (self.vicreg.encoder, self.vicreg.second_encoder, self.vicreg)
        )
        del vicreg["model_type"]
        return dataclasses.asdict(self.run) | {
            "model": _plain(model),
            **({"second_model": _plain(second)} if second else {}),
            "vicreg": _plain(vicreg),
            "views": _plain(dataclasses.asdict(self.views)),
        }


def _plain(value: Any) -> Any:
    """Tuples as lists, so that YAML and JSON give back what was stored."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
