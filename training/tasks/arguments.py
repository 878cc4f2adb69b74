"""Flags of `hf-vicreg finetune detection`, `segmentation`, `captioning`, `multitask`; light: the parser reads all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import check_seed, flag
from hf_vicreg.training.run.run_folder import refuse_foreign_folder

OWN_FILE = "finetuning.json"  # what a folder has to hold to be taken for a fine-tuned model of ours


@dataclass
class RunArguments:
    """How a task model, or several, is trained."""

    output_dir: str = flag("", "Folder of the fine-tuned model, new or empty.")
    batch_size: int = flag(16, "Images a step over all processes.")
    num_train_epochs: int = flag(50, "Passes over the training images.")
    max_steps: int | None = flag(None, "Steps, instead of `num_train_epochs`.")
    learning_rate: float = flag(5e-4, "Peak learning rate of AdamW; 5%% warm-up, then a cosine to 0.")
    encoder_learning_rate_ratio: float = flag(
        0.5, "Factor on the learning rate of the pretrained encoder; 0 freezes it."
    )
    warmup_ratio: float = flag(0.05, "Share of the steps with linear warm-up.")
    weight_decay: float = flag(1e-4, "AdamW's decoupled decay; biases, norms and tokens are exempt.")
    max_grad_norm: float = flag(1.0, "Clip the norm of the gradient; 0 turns it off.")
    mixed_precision: str = flag("no", "`auto` (bf16 where the device has it), `bf16` or `no`.")
    dataloader_num_workers: int = flag(0, "Loader processes.")
    logging_steps: int = flag(10, "Steps between lines of log.jsonl.")
    eval_steps: int | None = flag(None, "Steps between measurements on the test images; default: at the end alone.")
    checkpointing_steps: int = flag(500, "Steps between checkpoints; one more at the end.")
    checkpoints_total_limit: int = flag(2, "Newest checkpoints to keep.")
    resume_from_checkpoint: str | None = flag(None, "`latest`, or a folder below `output_dir`/checkpoints.")
    seed: int = flag(0, "Seed of new weights, order and augmentation.")


@dataclass
class TaskArguments(RunArguments):
    """What every fine-tuning of a task model takes."""

    dataset_name: str = flag("", "Hub id, local `datasets` folder, or folder of images with a metadata file.")
    dataset_config_name: str | None = flag(None, "Configuration of the Hub dataset.")
    train_split: str = flag("train", "Split to train on.")
    test_split: str | None = flag(None, "Split to test on; default: `test` or `validation`.")
    image_column_name: str | None = flag(None, "Column of images; default: the only image column.")
    max_train_samples: int | None = flag(None, "Use the first so many training images.")
    max_test_samples: int | None = flag(None, "Use the first so many test images.")
    flip_probability: float = flag(0.5, "Horizontal flip.")
    lora_rank: int = flag(0, "Train low-rank adapters of the encoder in place of its weights; 0: all learn.")
    from_scratch: bool = flag(False, "Take MODEL's configuration, not its weights.")
    per_device_eval_batch_size: int = flag(8, "Test images at once.")


@dataclass
class DetectionArguments(TaskArguments):
    """A detector: Deformable DETR over the encoder."""

    objects_column_name: str = flag(
        "objects", "Column with `bbox` (x, y, width, height in pixels) and `category` of each object."
    )
    strict_boxes: bool = flag(
        False,
        "Stop at a box without area or outside of its image; default: such boxes are cut or left out, and listed.",
    )
    image_height: int = flag(480, "Height in pixels that images are fitted into and padded to, without squashing.")
    image_width: int = flag(640, "The same for the width.")
    num_queries: int = flag(100, "Most objects found in an image.")
    scale_jitter: float = flag(0.25, "Images are magnified by a factor from 1 +- this; what is too large is cropped.")
    d_model: int = flag(256, "Width of the detector behind the encoder, a multiple of 32.")
    encoder_layers: int = flag(2, "Layers of deformable attention over the feature map.")
    decoder_layers: int = flag(3, "Layers from queries to boxes.")


@dataclass
class SegmentationArguments(TaskArguments):
    """A segmenter: UperNet over the encoder."""

    mask_column_name: str = flag("mask", "Column of masks, images with a class index (255: unknown) a pixel.")
    class_names: str | None = flag(
        None, "Names of the classes from 0 on, with commas between; default: numbers, as many as training masks show."
    )
    instances: bool = flag(
        False, "Masks number objects from 1 on (0: none); learn background, interior and border, tell objects apart."
    )
    image_height: int = flag(256, "Height in pixels of what the model sees at once; larger images go by windows.")
    image_width: int = flag(256, "The same for the width.")
    scale_jitter: float = flag(0.25, "Training crops are magnified by a factor from 1 +- this.")
    quarter_turns: bool = flag(False, "Turn training images by 0, 90, 180 or 270 degrees: where there is no above.")
    dice_of_background: bool = flag(False, "Count class 0 in Dice like any other; default: it is the background.")
    decoder_hidden_size: int = flag(128, "Width of the part behind the encoder, a multiple of 32.")


@dataclass
class DenseArguments:
    """Patch tokens on images with masks, without fine-tuning."""

    dataset_name: str = flag("", "Hub id, local `datasets` folder, or folder of images with a metadata file.")
    dataset_config_name: str | None = flag(None, "Configuration of the Hub dataset.")
    train_split: str = flag("train", "Split with the known masks.")
    test_split: str | None = flag(None, "Split to test on; default: `test` or `validation`.")
    image_column_name: str | None = flag(None, "Column of images; default: the only image column.")
    mask_column_name: str = flag("mask", "Column of masks, images with a class index (255: unknown) a pixel.")
    class_names: str | None = flag(
        None, "Names of the classes from 0 on, with commas between; default: numbers, as many as training masks show."
    )
    instances: bool = flag(False, "Masks number objects from 1 on (0: none): background, interior and border.")
    max_train_samples: int | None = flag(None, "Use the first so many training images.")
    max_test_samples: int | None = flag(None, "Use the first so many test images.")
    image_height: int = flag(256, "Height in pixels of what the model sees at once; larger images go by windows.")
    image_width: int = flag(256, "The same for the width.")
    neighbours: int = flag(20, "k of the k-NN.")
    bank_size: int = flag(5_000, "About so many patches of training images are learned from.")
    held_out_ratio: float = flag(0.2, "Share of these on which the C of the linear probe is chosen.")
    seed: int = flag(0, "Seed of everything drawn.")
    output_dir: str | None = flag(
        None, "Folder for results.json; default: MODEL if it is the folder of a run, else ./NAME-evaluation."
    )


@dataclass
class CaptioningArguments(TaskArguments):
    """A captioner: a text decoder over the encoder."""

    text_column_name: str = flag("text", "Column of captions.")
    batch_size: int = flag(64, "Images a step over all processes.")
    num_train_epochs: int = flag(10, "Passes over the training images.")
    weight_decay: float = flag(0.05, "AdamW's decoupled decay; biases, norms and tokens are exempt.")
    flip_probability: float = flag(0.0, "Horizontal flip; leave it out where captions say left and right.")
    crop_min_ratio: float = flag(0.5, "Smallest crop of a training image, as a share of its area.")
    decoder_hidden_size: int = flag(192, "Width of the decoder, a multiple of 32.")
    decoder_layers: int = flag(3, "Layers of the decoder.")
    vocab_size: int = flag(2000, "Most tokens of the tokenizer, which is made from the training captions.")
    max_target_length: int = flag(64, "Longest caption in tokens; longer ones are cut.")
    mixed_precision: str = flag("auto", "`auto` (bf16 where the device has it), `bf16` or `no`.")
    per_device_eval_batch_size: int = flag(64, "Test images at once.")


@dataclass
class LabelArguments(TaskArguments):
    """Classes of images, several of them an image, or numbers; a task among several."""

    label_column_name: str = flag("label", "Column of classes, of lists of them, or of numbers or lists of numbers.")
    crop_min_ratio: float = flag(0.5, "Smallest crop of a training image, as a share of its area.")
    per_device_eval_batch_size: int = flag(64, "Test images at once.")


@dataclass
class MultitaskArguments(RunArguments):
    """One encoder and a head for each of several tasks, trained together."""

    batch_size: int = flag(32, "Images a step over all tasks and processes.")
    num_train_epochs: int = flag(50, "Passes over the training images of all tasks together.")
    temperature: float = flag(
        1.0, "Images a step of a task are in proportion to (its training images)^(1 / this); larger is more even."
    )
    weighting: Literal["fixed", "uncertainty"] = flag(
        "fixed", "How losses are weighted: as each task's `weight` says, or learned, by each task's noise."
    )
    only: str | None = flag(None, "Train this task alone, in the same steps and images, to compare with.")


AT_LEAST: dict[str, float] = {
    **dict.fromkeys(("max_train_samples", "max_test_samples", "batch_size", "num_train_epochs", "max_steps"), 1),
    **dict.fromkeys(("per_device_eval_batch_size", "logging_steps", "eval_steps", "checkpointing_steps"), 1),
    **dict.fromkeys(("checkpoints_total_limit", "image_height", "image_width", "num_queries"), 1),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("learning_rate", "encoder_learning_rate_ratio", "weight_decay", "max_grad_norm"), 0),
    **dict.fromkeys(("dataloader_num_workers", "lora_rank"), 0),
    "temperature": 1,
    "max_target_length": 2,  # a token and the end
    "vocab_size": 260,  # bytes and the special tokens
}
ELSEWHERE = {
    *(
        "strict_boxes",
        "dataset_name",
        "dataset_config_name",
        "train_split",
        "test_split",
        "image_column_name",
        "max_train_samples",
    ),
    *("max_test_samples", "output_dir", "resume_from_checkpoint", "dataloader_num_workers", "logging_steps"),
    *("per_device_eval_batch_size", "eval_steps", "checkpointing_steps", "checkpoints_total_limit"),
}
SHARES = ("warmup_ratio", "flip_probability", "crop_min_ratio")


def check_task(arguments: TaskArguments) -> Path:
    """Check what the types of the flags cannot say, and return the output folder; nothing is written.

    Raises:
        InputError: A value out of range, no data, or a folder that is not new, empty or one to resume.
    """
    check_run(arguments)
    values = vars(arguments)
    if not 0 <= values.get("scale_jitter", 0) < 0.9:
        raise InputError(f"`scale_jitter`: expected a number from 0 to below 0.9, got {values['scale_jitter']}.")
    for name in ("d_model", "decoder_hidden_size"):
        if values.get(name, 32) < 32 or values.get(name, 32) % 32:
            raise InputError(f"`{name}`: expected a multiple of 32, got {values[name]}.")
    if isinstance(arguments, DetectionArguments) and arguments.decoder_layers < 2:
        # transformers ties the heads of the later layers to the first one's, and cannot save a single one
        raise InputError(f"`decoder_layers`: expected at least 2 of a detector, got {arguments.decoder_layers}.")
    if arguments.from_scratch and not arguments.encoder_learning_rate_ratio:
        raise InputError(
            "`encoder_learning_rate_ratio`: expected more than 0 with --from_scratch, which leaves nothing to freeze."
        )
    if arguments.lora_rank and (arguments.from_scratch or not arguments.encoder_learning_rate_ratio):
        other = "--from_scratch" if arguments.from_scratch else "--encoder_learning_rate_ratio 0"
        raise InputError(f"`lora_rank`: expected a pretrained encoder that learns, got {other}; leave one out.")
    if not arguments.dataset_name:
        raise InputError("`dataset_name`: expected annotated images, got none; add --dataset_name NAME.")
    return output_folder(arguments)


def check_run(arguments: RunArguments) -> None:
    """Check the ranges of numbers, and the precision.

    Raises:
        InputError: A value out of range.
    """
    values = vars(arguments)
    for name, least in AT_LEAST.items():
        if values.get(name) is not None and not least <= values[name] < float("inf"):
            raise InputError(f"`{name}`: expected a number of at least {least}, got {values[name]}.")
    check_seed(arguments.seed)
    for name in SHARES:
        if not 0 <= values.get(name, 0) <= 1:
            raise InputError(f"`{name}`: expected a number from 0 to 1, got {values[name]}.")
    if arguments.mixed_precision not in ("auto", "bf16", "no"):
        raise InputError(f"`mixed_precision`: expected 'auto', 'bf16' or 'no', got {arguments.mixed_precision!r}.")


def output_folder(arguments: RunArguments) -> Path:
    """Return the output folder; nothing is written.

    Raises:
        InputError: None, or one that is not new, empty or one to resume.
    """
    if not arguments.output_dir:
        raise InputError("`output_dir`: expected a folder for the model, got none; add --output_dir FOLDER.")
    folder = Path(arguments.output_dir)
    refuse_foreign_folder(folder, OWN_FILE, resuming=arguments.resume_from_checkpoint is not None)
    return folder


def settings_of(arguments: RunArguments) -> dict[str, Any]:
    """Return the flags that change a figure and are not said among the data."""
    return {key: value for key, value in vars(arguments).items() if key not in ELSEWHERE}
