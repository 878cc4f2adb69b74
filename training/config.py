"""A run's configuration: defaults, then the recipe, then flags; unknown keys fail."""

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import CONFIG_MAPPING, HfArgumentParser, PreTrainedConfig

from hf_vicreg.modeling.configuration_vicreg import VicRegConfig, encoder_config
from hf_vicreg.training.errors import InputError, as_input_error


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
    """Flags of a run. Sections of the recipe have dotted flags: `--model.KEY`, `--vicreg.KEY`, `--views.KEY`."""

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
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MAX_SEED = 2**32 - 1001  # every process adds its rank, and numpy takes 32 bits


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


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("hf_vicreg.training") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Return a recipe's dictionary.

    Args:
        name_or_path: The name of a recipe of the package, or a YAML file.

    Raises:
        InputError: No such recipe, or not a YAML mapping.
    """
    path = Path(name_or_path)
    if name_or_path in recipe_names():
        text = (resources.files("hf_vicreg.training") / "recipes" / f"{name_or_path}.yaml").read_text()
    elif path.is_file():
        try:
            text = path.read_text()
        except UnicodeDecodeError as error:
            raise InputError(f"`config`: expected a YAML file, {name_or_path} is not text.") from error
    else:
        raise InputError(f"`config`: expected a YAML file or one of {recipe_names()}, got {name_or_path!r}.")
    try:
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a bare ValueError
        raise InputError(f"`config`: {name_or_path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"`config`: expected a mapping of keys in {name_or_path}, got {type(recipe).__name__}.")
    return recipe


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help.")  # one line, without the usage text


def parse_flags(arguments: list[str]) -> dict[str, Any]:
    """Return the explicit flags of a command line as a nested dictionary, `config` among them if given.

    Raises:
        InputError: An unknown flag, or a dotted flag without a value.
    """
    parser = _Parser(
        [PretrainArguments],
        prog="hf_vicreg.training.pretrain",
        description="Pretrain an encoder by VICReg. Sections of a recipe have dotted flags: --model.KEY (encoder), "
        "--vicreg.KEY (expander and loss), --views.KEY (augmentation); for example --model.tile_size 4.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help=f"Recipe: a YAML file or one of {', '.join(recipe_names())}.")
    for action in parser._actions:  # only what was typed counts: defaults come after the recipe
        action.default = argparse.SUPPRESS
    known, rest = parser.parse_known_args(arguments)
    given = vars(known)
    while rest:
        flag, separator, value = rest.pop(0).partition("=")
        section, dot, key = flag.removeprefix("--").partition(".")
        if not (flag.startswith("--") and dot and section in SECTIONS):
            names = [f"--{one.name}" for one in dataclasses.fields(PretrainArguments)]
            raise InputError(f"`{flag}`: unknown flag{_hint(flag, names)}; see --help.")
        if not separator:
            if not rest:
                raise InputError(f"`{flag}`: expected a value, got none.")
            value = rest.pop(0)
        try:
            given.setdefault(section, {})[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise InputError(f"`{flag}`: expected a YAML value, got {value!r}.") from error
    return given


def resolve(given: dict[str, Any]) -> RunConfig:
    """Return the run's configuration from explicit settings and, if `config` is among them, a recipe below them.

    Args:
        given: Nested dictionary of settings; `config` names a recipe.

    Raises:
        InputError: An unknown key or a value of the wrong type or range, in the recipe or among the settings.
    """
    given = {key: value for key, value in given.items() if value is not None}
    name = given.pop("config", None)
    recipe = read_recipe(str(name)) if name is not None else {}
    if given.keys() & {"dataset_name", "train_dir"}:  # the recipe's data gives way, whichever of the two names it
        recipe = {key: value for key, value in recipe.items() if key not in ("dataset_name", "train_dir")}
    merged: dict[str, Any] = {}
    for origin, settings in ((f"recipe {name}", recipe), ("arguments", given)):
        for key, value in settings.items():
            known = [one.name for one in dataclasses.fields(PretrainArguments)]
            if key not in known and key not in SECTIONS:
                raise InputError(f"`{key}`: unknown key in {origin}{_hint(key, [*known, *SECTIONS])}.")
            if key in SECTIONS:
                if isinstance(value, PreTrainedConfig):
                    fields = {name: one for name, one in value.to_diff_dict().items() if name not in RESERVED}
                    value = fields | {"model_type": value.model_type}
                if not isinstance(value, dict):
                    raise InputError(f"`{key}`: expected a mapping in {origin}, got {value!r}.")
                merged.setdefault(key, {}).update(_expand_preset(value) if key == "views" else value)
            else:
                merged[key] = value
    sections = {section: merged.pop(section, {}) for section in SECTIONS}
    run = PretrainArguments(**_typed(PretrainArguments, merged, ""))
    views = ViewsConfig(**_typed(ViewsConfig, sections["views"], "views."))
    encoder = _encoder(sections["model"], "model")
    second = _encoder(sections["second_model"], "second_model") if sections["second_model"] else None
    with as_input_error("vicreg"):
        _check_keys(sections["vicreg"], VicRegConfig(), "vicreg")
        vicreg = VicRegConfig(encoder=encoder, second_encoder=second, **sections["vicreg"])
    _check_ranges(run)
    config = RunConfig(run=run, views=views, vicreg=vicreg)
    _check_local_views(config)
    return config


def _encoder(settings: dict[str, Any], section: str) -> PreTrainedConfig:
    """Return an encoder's configuration from its section of the settings."""
    with as_input_error(section):
        encoder = encoder_config({})
        model_type = settings.get("model_type", encoder.model_type)
        if model_type != encoder.model_type and model_type not in CONFIG_MAPPING:
            raise InputError(
                f"`{section}.model_type`: expected a model type transformers knows, got {model_type!r}"
                f"{_hint(model_type, list(CONFIG_MAPPING))}."
            )
        if model_type != encoder.model_type:
            encoder = encoder_config({"model_type": model_type})
        _check_keys(settings, encoder, section)
        encoder = encoder_config(settings)
        if getattr(encoder, "num_channels", 3) != 3:
            raise InputError(
                f"`{section}.num_channels`: expected 3, images are read as RGB, got {encoder.num_channels}."
            )
    return encoder


def _check_local_views(config: RunConfig) -> None:
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


def _expand_preset(views: dict[str, Any]) -> dict[str, Any]:
    """Return a layer's settings of the views with its preset spelled out; settings beside the preset win over it."""
    views = dict(views)
    name = views.pop("preset", None)
    if name is not None and name not in VIEW_PRESETS:
        raise InputError(f"`views.preset`: expected one of {sorted(VIEW_PRESETS)}, got {name!r}.")
    return VIEW_PRESETS.get(name, {}) | views


def _check_ranges(run: PretrainArguments) -> None:
    at_least = {
        "num_train_epochs": 1,
        "max_steps": 1,
        "max_train_samples": 1,
        "learning_rate": 0,
        "min_learning_rate": 0,
        "weight_decay": 0,
        "warmup_ratio": 0,
        "max_grad_norm": 0,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 1,
        "checkpoints_keep_every_steps": 1,
        "max_time": 0,
        "max_skipped_steps": 1,
        "knn_every_epochs": 0,
        "knn_neighbours": 1,
        "knn_train_samples": 1,
        "knn_test_samples": 1,
    }
    for name, least in at_least.items():
        value = getattr(run, name)
        if value is not None and not value >= least:
            raise InputError(f"`{name}`: expected at least {least}, got {value}.")
    for name in ("batch_size", "per_device_train_batch_size"):
        value = getattr(run, name)
        if value is not None and value < (2 if name == "batch_size" else 1):
            raise InputError(f"`{name}`: expected at least 2 images for a covariance, got {value}; raise it.")
    if run.statistics_batch_size is not None and run.per_device_train_batch_size is None:
        check_statistics_batch(run)
    if run.learning_rate == math.inf:
        raise InputError("`learning_rate`: expected a finite number, got inf.")
    if run.min_learning_rate > run.learning_rate:
        raise InputError(
            f"`min_learning_rate`: expected at most `learning_rate` {run.learning_rate}, got {run.min_learning_rate}."
        )
    if (run.checkpoints_keep_every_steps or run.checkpointing_steps) % run.checkpointing_steps:
        raise InputError(
            f"`checkpoints_keep_every_steps`: expected a multiple of the {run.checkpointing_steps} "
            f"`checkpointing_steps`, got {run.checkpoints_keep_every_steps}."
        )
    if run.warmup_ratio > 1:
        raise InputError(f"`warmup_ratio`: expected a share of the steps from 0 to 1, got {run.warmup_ratio}.")
    if not 0 <= run.seed <= MAX_SEED:
        raise InputError(f"`seed`: expected an integer from 0 to {MAX_SEED}, got {run.seed}.")
    for name in ("adam_beta1", "adam_beta2"):
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
    if not run.output_dir:
        raise InputError("`output_dir`: expected a folder for the run, got none; add --output_dir FOLDER.")
    if bool(run.dataset_name) == bool(run.train_dir):
        found = "both" if run.dataset_name else "none"
        raise InputError(f"`dataset_name`, `train_dir`: expected one of the two, got {found}.")
    if run.streaming:
        if run.dataset_name in (None, "digits"):
            raise InputError("`streaming`: expected a dataset to stream; name a Hub id or a folder of parquet shards.")
        if run.max_steps is None:
            raise InputError("`max_steps`: expected a number of steps, a stream has no epochs; add --max_steps N.")
        for name in ("max_train_samples", "test_split"):
            if getattr(run, name) is not None:
                raise InputError(f"`{name}`: expected none with --streaming, which reads the train split alone.")


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


def _check_keys(settings: dict[str, Any], config: PreTrainedConfig, section: str) -> None:
    known = [name for name in config.to_dict() if not name.startswith("_") and name not in RESERVED]
    for key in settings:
        if key not in known and key != "model_type":
            raise InputError(f"`{section}.{key}`: unknown key{_hint(key, known)}.")


def _typed(kind: type, settings: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Check and convert plain values to the types of a dataclass's fields; YAML reads 1e-3 as a string, for one."""
    hints = typing.get_type_hints(kind)
    typed: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in hints:
            raise InputError(f"`{prefix}{key}`: unknown key{_hint(key, list(hints))}.")
        accepted = typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
        expected = next(one for one in accepted if one is not type(None))
        if isinstance(value, list | tuple) and tuple[float, float] in accepted:
            if len(value) != 2:
                raise InputError(f"`{prefix}{key}`: expected a number, or two for the two views, got {value}.")
            typed[key] = tuple(_typed(kind, {key: one}, prefix)[key] for one in value)
            continue
        try:
            if value is None and type(None) in accepted:
                typed[key] = None
            elif expected is str:
                typed[key] = "no" if value is False else str(value)  # YAML reads a bare `no` as false
            elif isinstance(value, bool) != (expected is bool) or value is None:
                raise ValueError
            else:
                typed[key] = expected(value)
                if typed[key] != float(value):
                    raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"`{prefix}{key}`: expected {expected.__name__}, got {value!r}.") from error
    return typed


def _hint(key: object, known: list[str]) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _plain(value: Any) -> Any:
    """Tuples as lists, so that YAML and JSON give back what was stored."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
