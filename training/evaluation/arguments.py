"""Flags of `hf-vicreg evaluate` and `hf-vicreg finetune`; light, for the command's parser reads them all."""

from dataclasses import dataclass, field
from typing import Any, Literal

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.run.checks import MAX_SEED


def flag(default: Any, text: str) -> Any:
    """Return a dataclass field with its help."""
    shown = text if default in (None, "", False) else f"{text} (default: {default})"
    return field(default=default, metadata={"help": shown})


@dataclass
class LabelledDataArguments:
    """Which labelled images."""

    dataset_name: str = flag(
        "", "Hub id, local `datasets` folder, folder of images with a sub-folder for each class, tars, or `digits`."
    )
    dataset_config_name: str | None = flag(None, "Configuration of the Hub dataset.")
    train_split: str = flag("train", "Split with the known labels.")
    test_split: str | None = flag(None, "Split to test on, or tars; default: `test` or `validation`.")
    image_column_name: str | None = flag(None, "Column of images; default: the only image column.")
    label_column_name: str = flag("label", "Column of class indices or of class names.")
    labels_file: str | None = flag(
        None,
        "CSV file with the labels of images of --dataset_name: file_name, label and split (train or test), as "
        "`hf-vicreg explore` saves it.",
    )
    max_train_samples: int | None = flag(None, "Use the first so many training images.")
    max_test_samples: int | None = flag(None, "Use the first so many test images.")
    per_device_eval_batch_size: int = flag(256, "Images encoded at once.")


@dataclass
class EvaluationArguments(LabelledDataArguments):
    """What every evaluation takes."""

    output_dir: str | None = flag(
        None,
        "Folder for results.json and pictures; default: MODEL if it is the folder of a run, else ./NAME-evaluation.",
    )
    cache_dir: str | None = flag(None, "Folder of cached features; default: hf_vicreg/features in HF_HOME.")
    embeddings: list[str] | None = field(
        default=None,
        metadata={"help": "One or two folders of `hf-vicreg embed` to read features from: of training, test images."},
    )
    seed: int = flag(0, "Seed of everything drawn.")


@dataclass
class KnnArguments(EvaluationArguments):
    """k-NN."""

    neighbours: list[int] = field(
        default_factory=lambda: [1, 5, 10, 20, 200],
        metadata={"help": "Values of k; those above the number of images are left out (default: 1 5 10 20 200)."},
    )
    temperature: float = flag(0.07, "Of the weights exp(cosine / temperature).")


@dataclass
class LinearArguments(EvaluationArguments):
    """Linear probe."""

    held_out_ratio: float = flag(0.2, "Share of the training images on which C is chosen.")


@dataclass
class RetrievalArguments(EvaluationArguments):
    """Retrieval."""


@dataclass
class ImageTextArguments:
    """Images and captions that find each other, and class names that find images."""

    dataset_name: str = flag("", "Hub id, local `datasets` folder, or folder of images with a metadata file.")
    dataset_config_name: str | None = flag(None, "Configuration of the Hub dataset.")
    test_split: str | None = flag(None, "Split to measure on; default: `test` or `validation`.")
    image_column_name: str | None = flag(None, "Column of images; default: the only image column.")
    caption_column: list[str] | None = field(
        default=None, metadata={"help": "Columns of captions, for retrieval: texts or lists of them."}
    )
    second_image_column_name: str | None = flag(
        None, "Column of other pictures of the same things, which find each other, beside raw pixels'."
    )
    label_column_name: str | None = flag(None, "Column of classes, for zero-shot classification.")
    class_names: list[str] | None = field(
        default=None, metadata={"help": "What the classes are called, in order; default: as the data set says."}
    )
    templates: list[str] = field(
        default_factory=lambda: ["{}"], metadata={"help": "Texts for a class, `{}` being its name (default: {})."}
    )
    max_test_samples: int | None = flag(None, "Use the first so many images.")
    output_dir: str | None = flag(
        None, "Folder for results.json; default: MODEL if it is the folder of a run, else ./NAME-evaluation."
    )


@dataclass
class TuningArguments:
    """How a classifier is fine-tuned, alone or among few-label runs."""

    batch_size: int = flag(64, "Labelled images a step over all processes.")
    num_train_epochs: int = flag(30, "Passes over the labelled images.")
    max_steps: int | None = flag(None, "Steps, instead of `num_train_epochs`.")
    learning_rate: float = flag(5e-4, "Peak learning rate of AdamW, of the head; 10%% warm-up, then a cosine to 0.")
    layer_decay: float = flag(0.75, "Factor on the learning rate from one layer to the one before; 1 turns it off.")
    weight_decay: float = flag(0.05, "AdamW's decoupled decay; biases, norms and tokens are exempt.")
    warmup_ratio: float = flag(0.1, "Share of the steps with linear warm-up.")
    max_grad_norm: float = flag(3.0, "Clip the norm of the gradient; 0 turns it off.")
    freeze_encoder: bool = flag(False, "Train the head alone.")
    lora_rank: int = flag(0, "Train low-rank adapters of the encoder in place of its weights; 0: all learn.")
    mixup_alpha: float = flag(0.0, "Mix pairs of images with a share from Beta(alpha, alpha); 0 turns it off.")
    crop_min_ratio: float = flag(0.5, "Smallest crop of a training image, as a share of its area.")
    flip_probability: float = flag(0.5, "Horizontal flip.")
    unlabelled_batch_size: int = flag(128, "Unlabelled images a step over all processes, for the consistency loss.")
    consistency_weight: float = flag(1.0, "Weight of the consistency loss.")
    confidence_threshold: float = flag(0.8, "Unlabelled images predicted with less than this are left out.")
    sharpening_temperature: float = flag(0.4, "Divides the logits of the prediction that is the target.")
    annealing: Literal["none", "log", "linear", "exp"] = flag(
        "log", "Schedule below which labelled images count: those already predicted better wait."
    )
    strong_crop_min_ratio: float = flag(0.2, "Smallest crop of the strongly augmented view.")
    mixed_precision: str = flag("auto", "`auto` (bf16 where the device has it), `bf16` or `no`.")
    dataloader_num_workers: int = flag(0, "Loader processes.")


@dataclass
class FewLabelsArguments(TuningArguments, EvaluationArguments):
    """Few labels."""

    labels: list[str] = field(
        default_factory=lambda: ["1%", "10%", "10"],
        metadata={"help": "How many labels: percentages, and numbers for each class (default: 1%% 10%% 10)."},
    )
    methods: list[str] = field(
        default_factory=lambda: ["linear", "finetuned"],
        metadata={
            "help": "Of linear, finetuned, scratch (the same model untrained), consistency (finetuned, and all other "
            "training images without their labels) (default: linear finetuned)."
        },
    )
    num_seeds: int = flag(3, "Draws of the labels, with seeds `seed`, `seed` + 1, ...")
    max_steps: int | None = flag(300, "Steps of a fine-tuning, however few the labels.")


@dataclass
class FinetuneArguments(TuningArguments, LabelledDataArguments):
    """One classifier."""

    output_dir: str = flag("", "Folder of the classifier, new or empty.")
    labels_per_class: int | None = flag(None, "Use the labels of so many images of each class, drawn with `seed`.")
    consistency: bool = flag(False, "Add the consistency loss on unlabelled images.")
    unlabelled_dir: str | None = flag(
        None, "Folder of unlabelled images for the consistency loss; default: all training images."
    )
    from_scratch: bool = flag(False, "Take MODEL's configuration, not its weights.")
    logging_steps: int = flag(10, "Steps between lines of log.jsonl.")
    checkpointing_steps: int = flag(500, "Steps between checkpoints; one more at the end.")
    checkpoints_total_limit: int = flag(2, "Newest checkpoints to keep.")
    resume_from_checkpoint: str | None = flag(None, "`latest`, or a folder below `output_dir`/checkpoints.")
    seed: int = flag(0, "Seed of the head, order and augmentation.")


AT_LEAST: dict[str, float] = {
    "max_train_samples": 1,
    "max_test_samples": 1,
    "per_device_eval_batch_size": 1,
    "batch_size": 1,
    "unlabelled_batch_size": 1,
    "lora_rank": 0,
    "num_train_epochs": 1,
    "max_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "mixup_alpha": 0,
    "consistency_weight": 0,
    "dataloader_num_workers": 0,
    "num_seeds": 1,
    "labels_per_class": 1,
    "logging_steps": 1,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
}
SHARES = ("layer_decay", "warmup_ratio", "crop_min_ratio", "strong_crop_min_ratio", "flip_probability")
METHODS = ("linear", "finetuned", "scratch", "consistency")


def check_ranges(arguments: LabelledDataArguments) -> None:
    """Check what the types of the flags cannot say.

    Raises:
        InputError: A value out of range.
    """
    values = vars(arguments)
    for name, least in AT_LEAST.items():
        if values.get(name) is not None and not least <= values[name] < float("inf"):
            raise InputError(f"`{name}`: expected a number of at least {least}, got {values[name]}.")
    for name in (*SHARES, "confidence_threshold"):
        if name in values and not 0 <= values[name] <= 1:
            raise InputError(f"`{name}`: expected a number from 0 to 1, got {values[name]}.")
    for name in ("temperature", "sharpening_temperature"):
        if name in values and not 0 < values[name] < float("inf"):
            raise InputError(f"`{name}`: expected a number above 0, got {values[name]}.")
    if not 0 < values.get("held_out_ratio", 0.5) < 1:
        raise InputError(f"`held_out_ratio`: expected a share between 0 and 1, got {values['held_out_ratio']}.")
    if values.get("mixed_precision", "no") not in ("auto", "bf16", "no"):
        raise InputError(f"`mixed_precision`: expected 'auto', 'bf16' or 'no', got {values['mixed_precision']!r}.")
    for one in values.get("neighbours", []):
        if one < 1:
            raise InputError(f"`neighbours`: expected numbers of at least 1, got {one}.")
    for one in values.get("methods", []):
        if one not in METHODS:
            raise InputError(f"`methods`: expected some of {', '.join(METHODS)}, got {one!r}.")
    if values.get("mixup_alpha") and (values.get("consistency") or "consistency" in values.get("methods", [])):
        raise InputError("`mixup_alpha`: expected 0 with the consistency loss, whose annealing reads single labels.")
    if values.get("lora_rank") and (values.get("freeze_encoder") or values.get("from_scratch")):
        other = "--freeze_encoder" if values["freeze_encoder"] else "--from_scratch"
        raise InputError(f"`lora_rank`: expected a pretrained encoder that learns, got {other}; leave one out.")
    if len(values.get("embeddings") or []) > 2:
        raise InputError(
            f"`embeddings`: expected a folder for the training images and one for the test images, got "
            f"{len(values['embeddings'])}."
        )
    check_seed(values.get("seed", 0))
    if not arguments.dataset_name:
        raise InputError("`dataset_name`: expected labelled images, got none; add --dataset_name NAME.")


def check_seed(seed: int) -> None:
    """Check that NumPy and scikit-learn take a seed.

    Raises:
        InputError: They do not.
    """
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"`seed`: expected an integer from 0 to {MAX_SEED}, got {seed}.")
