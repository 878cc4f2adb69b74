"""What to train: encoder, grid, batch and expander, chosen from the images, the machine and the time alone.

Pure functions: nothing is measured here and nothing is read. A value that was given is kept, and the rest adapts to
it. The rates below are rough, and serve to choose between encoders; how long the run may be is measured afterwards.
"""

import copy
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
from hf_vicreg.modeling.modeling_bigbird_vit import layer_pattern
from hf_vicreg.training.errors import InputError, as_input_error
from hf_vicreg.training.objectives.registry import entry_of
from hf_vicreg.training.objectives.vicreg import VICREG
from hf_vicreg.training.planner.ladder import LADDER, training_flops, used_side
from hf_vicreg.training.planner.machine import Machine
from hf_vicreg.training.planner.schedule import words

MAX_DENSITY = 0.6
MIN_IMAGES = 16
SMALL = 128  # width of an encoder
SMALL_CELLS = 8  # a side, of the first rungs
CROP_MIN_RATIO = 0.2  # of small or few images
MAX_EPOCHS = 1000  # beyond that a small set of images teaches nothing new
EVENING_SECONDS = 3 * 3600.0
# of training, for each core of a CPU; of kinds that are not here, that of a GPU
FLOPS_PER_SECOND = {"cpu": 35e9, "cuda": 25e12, "mps": 1e12}
SHORT_STEPS = 10_000
LOG_LINES = 20  # at least, where there are as many steps
USED_SIZE = "crops make things look as much larger"
MEASURING_RATIO = 0.08  # of the time, for k-NN and retrieval between the first step and the last


@dataclass(frozen=True)
class Images:
    """What is known of the images.

    Attributes:
        count: How many there are.
        height: Median, in pixels.
        width: Median, in pixels.
        labelled: Whether k-NN can be measured on them.
    """

    count: int
    height: int
    width: int
    labelled: bool


@dataclass
class Choices:
    """Settings with every open value filled, and why each has its value.

    Attributes:
        settings: Nested, as `explicit_settings` returns them.
        reasons: By dotted name, in the order of the table.
        rung: Which encoder of the ladder; None if the encoder was given.
    """

    settings: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)
    rung: int | None = None

    def fill(self, name: str, value: Any, why: str) -> Any:
        """Set a value unless it was given, and return what holds."""
        section, _, key = name.rpartition(".")
        where = self.settings.setdefault(section, {}) if section else self.settings
        if where.get(key) is None:
            where[key] = value
            self.reasons[name] = why
        else:
            self.reasons[name] = "given"
        return where[key]


def is_open(settings: dict[str, Any]) -> bool:
    """Return whether a run is to be planned: its length, batch or encoder is left open, or a time is given for it."""
    run_length = settings.keys() & {"num_train_epochs", "max_steps"}
    batch = settings.keys() & {"batch_size", "per_device_train_batch_size", "statistics_batch_size"}
    encoder = settings.get("model", {}).keys() & {"hidden_size", "hidden_sizes", "model_type"}
    encoder = encoder or settings.get("model_name_or_path")
    return settings.get("time_budget") is not None or not (run_length and batch and encoder)


def choose(
    settings: dict[str, Any], images: Images, machine: Machine, seconds: float, *, at_most: int | None = None
) -> Choices:
    """Return settings for a run of so many seconds.

    Args:
        settings: What was given.
        images: To train on.
        machine: What one process may use.
        seconds: For the training.
        at_most: The highest rung of the ladder to take.

    Raises:
        InputError: Too few images, or a batch larger than the images.
    """
    if images.count < MIN_IMAGES:
        raise InputError(
            f"`data`: expected at least {MIN_IMAGES} usable images for a covariance worth the name, found "
            f"{images.count}; give more images."
        )
    made = Choices(copy.deepcopy(settings))
    side = _image_side(images, machine, seconds)
    given = settings.get("model", {})
    from_source = bool(settings.get("model_name_or_path"))
    own_encoder = given.get("model_type", "bigbird_vit") == "bigbird_vit" and not from_source
    if own_encoder:
        rung = _rung(images, machine, seconds, side)
        rung = rung if at_most is None else min(rung, at_most)
        size = LADDER[rung]
        made.rung = None if "hidden_size" in given else rung
        seen = "the smallest of the ladder" if rung == 0 else "the largest that sees images enough in the time"
        for key, value in size.fields_at(given.get("hidden_size")).items():
            if key != "initializer_range" or not {"hidden_size", "num_hidden_layers"} & given.keys():
                made.fill(f"model.{key}", value, seen)
        made.fill("model.pooling", "mean", "the mean of the patches")
        _choose_grid(made, side, size.cells, images)
    else:
        size = LADDER[0]
        if from_source and given.get("image_size") is not None:
            side = _side_of(settings, side)
            made.reasons["model.image_size"] = made.reasons["views.image_size"] = "given, or the source's"
        else:
            made.fill("views.image_size", side, _why_side(side, images))
        _choose_crops(made, _side_of(settings, side), images)
    _choose_batch(made, size.batch, images, machine)
    return made


def _image_side(images: Images, machine: Machine, seconds: float) -> int:
    """Return a side in pixels: the images' own, as far as the device can afford it; a multiple of 16, or 32."""
    core_hours = seconds / 3600 * machine.cores * machine.num_processes
    most = 224 if machine.device != "cpu" else 96 if core_hours < 4 else 128 if core_hours < 50 else 224
    own = min(images.height, images.width)
    return max(32, min(most, own // 16 * 16))


def _rung(images: Images, machine: Machine, seconds: float, side: int) -> int:
    per_second = FLOPS_PER_SECOND.get(machine.device, FLOPS_PER_SECOND["cuda"]) * (
        machine.cores if machine.device == "cpu" else 1
    )
    best = 0
    for index, size in enumerate(LADDER):
        seen = min(seconds * per_second * machine.num_processes / training_flops(size), MAX_EPOCHS * images.count)
        if seen >= size.images_seen:
            best = index
    return best


def _choose_grid(made: Choices, side: int, cells: int, images: Images) -> None:
    """Fill image sizes, patches and the pattern of attention, sparse on the grid of the views."""
    model = made.settings.setdefault("model", {})
    is_open = model.get("image_size") is None and made.settings.get("views", {}).get("image_size") is None
    if is_open:
        why = _why_side(side, images)
        given = {"patch_size", "patch_stride"} & model.keys()
        given = given or made.settings.get("views", {}).get("num_local_views")
        if not given and cells == SMALL_CELLS and min(images.height, images.width) <= 64:
            # a crop of a fifth to all of an image has 0.6 of its pixels on average, 0.77 of its side: the rest of a
            # larger view is interpolated
            why = f"three quarters of {side}: crops have no more pixels"
            side, cells = side * 3 // 4, cells * 3 // 4
        made.fill("views.image_size", side, why)
    else:
        side = made.settings.get("views", {}).get("image_size") or model["image_size"]
        made.reasons["views.image_size"] = "given"
    shortest = min(side) if isinstance(side, list | tuple) else side
    if "patch_size" not in model and "patch_stride" not in model:
        stride = max(1, shortest // cells)
        large = shortest >= 224 and cells == 16
        if large or entry_of(made.settings).whole_patches:
            made.fill("model.patch_size", 16 if large else stride, "as ViT has it")
        else:
            made.fill("model.patch_size", 2 * stride, "overlapping by half")
            made.fill("model.patch_stride", stride, "overlapping by half")
    elif "patch_size" not in model:
        made.fill("model.patch_size", 2 * model["patch_stride"], "overlapping by half")
    crop = _choose_crops(made, shortest, images)
    if is_open and not made.settings.get("second_model"):  # two encoders have one image processor
        used = used_side(side, crop, model.get("patch_stride") or model["patch_size"])
        made.fill("model.image_size", used, USED_SIZE)
    else:
        model.setdefault("image_size", side)
    if model.get("attention_type") == "original_full" or model.get("attention_layout") == "raster":
        return
    tile, links = _sparse_tile(model | {"image_size": side})
    made.fill("model.tile_size", tile, f"the largest with a density of at most {MAX_DENSITY}")
    made.fill("model.num_random_blocks", links, "with that tile")


def _choose_crops(made: Choices, side: int, images: Images) -> float:
    """Fill how the views are cropped, and return the smallest share of an image that they show."""
    crop = CROP_MIN_RATIO if side <= 64 or images.count < 5000 else 0.08
    why = "small or few images" if side <= 64 else "the paper's, or more where images are few"
    crop = made.fill("views.crop_min_ratio", crop, why)
    if side <= 64:
        made.fill("views.blur_probability", 0.0, "small images have no detail to spare")
    return float(crop)


def _sparse_tile(model: dict[str, Any]) -> tuple[Any, int]:
    """Return tile and number of random tiles: the largest tile whose density is at most `MAX_DENSITY`."""
    tiles = [model["tile_size"]] if "tile_size" in model else [8, 4, 2, 1]
    for tile in tiles:
        links = [8, 7, 6, 5, 4, 3, 2] if tile == 1 else [3, 2]  # many links to single patches cost little
        links = [model["num_random_blocks"]] if "num_random_blocks" in model else links
        for count in links:
            if density(model | {"tile_size": tile, "num_random_blocks": count}) <= MAX_DENSITY:
                return tile, count
    return tiles[-1], links[-1]


def density(model: dict[str, Any]) -> float:
    """Return the share of pairs that attend to each other on the encoder's own grid, the mean of its layers."""
    with as_input_error("model"):
        config = BigBirdViTConfig(**{key: value for key, value in model.items() if key != "model_type"})
        grid, layers = config.grid_size(*config.image_size_hw), range(config.num_hidden_layers)
        return statistics.fmean(layer_pattern(config, *grid, layer).density for layer in layers)


def _choose_batch(made: Choices, wanted: int, images: Images, machine: Machine) -> None:
    settings, processes = made.settings, machine.num_processes
    batch = settings.get("batch_size")
    made.reasons["batch_size"] = "given"
    if settings.get("per_device_train_batch_size") is not None:
        batch = settings["batch_size"] = settings["per_device_train_batch_size"] * processes
    if batch is None and settings.get("statistics_batch_size") is not None:
        # it is divided over as many steps of the encoder
        whole = settings["statistics_batch_size"]
        most = min(wanted, images.count, whole)
        divisors = [one for one in range(most, 0, -1) if whole % one == 0 and one % processes == 0]
        batch = made.fill("batch_size", divisors[0] if divisors else most, "a part of statistics_batch_size")
    if batch is None:
        # two steps an epoch at least, where that leaves a batch worth the name
        most = images.count if images.count < 2 * MIN_IMAGES else max(MIN_IMAGES, images.count // 2)
        batch = min(wanted, 2 ** int(math.log2(most)))
        batch = max(processes, batch // processes * processes)
        made.fill("batch_size", batch, "for a stable covariance" if batch == wanted else "half of the images or less")
    whole = settings.get("statistics_batch_size") or batch
    made.fill("vicreg.expander_sizes", entry_of(settings).expander_sizes(whole), "8 times the batch")
    hidden = settings.get("model", {}).get("hidden_size", 384)
    base = 1e-3 if hidden <= 192 else 5e-4
    if hidden <= SMALL and entry_of(settings) is VICREG and settings.get("learning_rate") is None:
        # the encoder's rate may be three times as high where the expander's is not; measured on the first rung alone
        widest = max(settings["vicreg"]["expander_sizes"])
        made.fill("expander_lr_scale", float(f"{min(1, hidden / widest):.2g}"), "encoder's width to the expander's")
        base = 3e-3 if settings["expander_lr_scale"] < 1 else base
    made.fill("learning_rate", float(f"{base * math.sqrt(whole / 256):.2g}"), "grows with the root of the batch")


def choose_schedule(
    made: Choices, num_steps: int, steps_per_epoch: int, step_seconds: float, knn_seconds: float
) -> None:
    """Fill what depends on the length of the run: its steps, checkpoints, measurements and the loss's weights.

    Args:
        made: In place.
        num_steps: Of the whole run.
        steps_per_epoch: Of a pass over the images.
        step_seconds: Measured.
        knn_seconds: One measurement of k-NN or retrieval; 0 without labels and captions.
    """
    settings = made.settings
    epochs = math.ceil(num_steps / steps_per_epoch)
    if not settings.keys() & {"num_train_epochs", "max_steps"}:
        made.fill("max_steps", num_steps, "what the time holds" if epochs < MAX_EPOCHS else "more would teach no more")
        made.fill("num_train_epochs", epochs, "passes over the images")
    made.fill("logging_steps", max(1, min(10, num_steps // LOG_LINES)), "lines enough to judge the run by")
    short = num_steps < SHORT_STEPS
    for name in ("vicreg.invariance_weight", "vicreg.variance_weight") if entry_of(settings).vicreg_weights else ():
        made.fill(name, 10.0 if short else 25.0, "more decorrelation, for a short run" if short else "the paper's")
    made.fill("warmup_ratio", 0.1, "a tenth of the steps")
    total = num_steps * step_seconds
    every = min(max(60.0, total / 20), 600.0)
    made.fill("checkpointing_steps", max(1, round(every / step_seconds)), f"about every {words(every)}")
    if knn_seconds:
        measurements = max(1, min(5, int(MEASURING_RATIO * total / knn_seconds)))
        made.fill("knn_every_epochs", max(1, math.ceil(epochs / measurements)), "at most a twelfth of the time")


def _side_of(settings: dict[str, Any], default: int) -> int:
    size = settings.get("views", {}).get("image_size") or settings.get("model", {}).get("image_size") or default
    return min(size) if isinstance(size, list | tuple) else size


def _why_side(side: int, images: Images) -> str:
    own = min(images.height, images.width)
    return "the images' own" if side >= own - 15 else f"what the time affords of the images' {own}"
