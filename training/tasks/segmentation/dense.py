"""`hf-vicreg evaluate dense`: what the tokens of patches are worth on images with masks, without any fine-tuning.

Each patch of the training images has the class of most of its pixels. A k-NN and a linear probe give each patch of the
test images a score for each class; scores are magnified to pixels, bilinearly, and the highest one counts. The same is
done with the pixels of patches and with an untrained encoder, to compare with. Source: k-NN and linear probes of patch
tokens as in Oquab et al. 2023, DINOv2 (arXiv 2304.07193), section 7.4, and Balazevic et al. 2023 (arXiv 2306.01667).
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hf_vicreg.training.errors import InputError, as_input_error
from hf_vicreg.training.evaluation.arguments import check_seed
from hf_vicreg.training.evaluation.encoder import VisionEncoder, load_vision_encoder, source_for
from hf_vicreg.training.evaluation.labelled import count_overlap
from hf_vicreg.training.evaluation.linear import fit_linear_probe, require_sklearn
from hf_vicreg.training.evaluation.neighbours import TEMPERATURE, votes_of
from hf_vicreg.training.evaluation.results import (
    FILE,
    add_evaluation,
    describe_data,
    evaluation_record,
    results_folder,
)
from hf_vicreg.training.images.channels.raster import arrays_of
from hf_vicreg.training.images.unusable import none_readable
from hf_vicreg.training.monitor.progress import Progress
from hf_vicreg.training.tasks.arguments import DenseArguments
from hf_vicreg.training.tasks.data import AnnotatedImages
from hf_vicreg.training.tasks.segmentation.data import load_segmentation
from hf_vicreg.training.tasks.segmentation.masks import IGNORED, check_extra, classes_of, read_mask
from hf_vicreg.training.tasks.segmentation.measures import class_scores, confusion
from hf_vicreg.training.tasks.segmentation.patches import (
    Describe,
    classes_of_patches,
    pixels_of_patches,
    tokens_by,
    untrained,
)

WINDOWS_AT_ONCE = 8


@dataclass(frozen=True)
class Patches:
    """Patches of training images.

    Attributes:
        values: `(patches, size)` float32.
        classes: `(patches,)` int64, the class of most of a patch's pixels.
    """

    values: torch.Tensor
    classes: torch.Tensor


def evaluate_dense(model: str, arguments: DenseArguments) -> dict[str, Any]:
    """Measure patch tokens, raw pixels and an untrained encoder, print and store; returns the entry of `results.json`.

    Args:
        model: Folder or Hub id of a vision model with a token for each patch.
        arguments: The flags.

    Raises:
        InputError: Bad input, or a model without such tokens.
    """
    started = time.perf_counter()
    if not arguments.dataset_name:
        raise InputError("`dataset_name`: expected images with masks, got none; add --dataset_name NAME.")
    if arguments.test_split == arguments.train_split:  # fine-tuning lets them be one, to see a few images learned
        raise InputError(f"`test_split`: expected another split than the {arguments.test_split!r} trained on.")
    for name in ("neighbours", "bank_size", "image_height", "image_width"):
        if getattr(arguments, name) < 1:
            raise InputError(f"`{name}`: expected at least 1, got {getattr(arguments, name)}.")
    if not 0 < arguments.held_out_ratio < 1:
        raise InputError(f"`held_out_ratio`: expected a share between 0 and 1, got {arguments.held_out_ratio}.")
    check_seed(arguments.seed)
    require_sklearn()
    if arguments.instances:
        check_extra()
    folder = results_folder(model, arguments.output_dir)
    encoder = load_vision_encoder(model)
    train, test, names = load_segmentation(arguments, partial(source_for, encoder.processor))
    window = (arguments.image_height, arguments.image_width)
    with as_input_error("image_height"):
        outputs = encoder.outputs(torch.zeros(1, getattr(encoder.model.config, "num_channels", 3), *window))
    rows, columns, _ = encoder.patch_tokens(outputs, *window).shape[1:]
    ways: dict[str, Describe] = {
        "pixels": lambda pixels: pixels_of_patches(pixels, rows, columns),
        "untrained": tokens_by(untrained(encoder, arguments.seed)),
        "": tokens_by(encoder),
    }
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {"classes": names, "strength": {}}
    for way, describe in ways.items():
        said = {"": "the encoder", "untrained": "the untrained encoder", "pixels": "raw pixels"}[way]
        bank = bank_of(train, describe, encoder, arguments, (rows, columns), len(names), said)
        probe = fit_linear_probe(
            bank.values, bank.classes, held_out_ratio=arguments.held_out_ratio, seed=arguments.seed, classes=len(names)
        )
        details["strength"][way or "trained"] = probe.strength
        scorers: dict[str, Describe] = {
            "knn": partial(_voted, bank, arguments.neighbours, len(names)),
            "linear": probe.probabilities,
        }
        for kind, counts in scored(test, describe, encoder, scorers, len(names), said, arguments).items():
            prefix = f"{way}_{kind}" if way else kind
            metrics |= {f"{prefix}_{name}": value for name, value in summary_of(counts, names).items()}
    record = evaluation_record(
        "dense",
        encoder.describe(),
        describe_data(
            arguments,
            train,
            test,
            count_overlap(train.digests, test.digests),
            mask_column=arguments.mask_column_name,
            num_classes=len(names),
            class_names=names,
        ),
        {name: getattr(arguments, name) for name in SETTINGS},
        metrics,
        details=details,
        pictures=[],
        seconds=time.perf_counter() - started,
    )
    add_evaluation(folder, record)
    _print(encoder.name, len(test), len(names), metrics)
    print(f"\n{folder / FILE}")
    return record


SETTINGS = ("instances", "image_height", "image_width", "neighbours", "bank_size", "held_out_ratio", "seed")


def bank_of(
    images: AnnotatedImages,
    describe: Describe,
    encoder: VisionEncoder,
    arguments: DenseArguments,
    grid: tuple[int, int],
    num_classes: int,
    said: str,
) -> Patches:
    """Return about `bank_size` patches of the training images, as many of each image, drawn by the seed.

    Raises:
        InputError: No readable image, or patches of one class alone.
    """
    window = (arguments.image_height, arguments.image_width)
    generator = torch.Generator().manual_seed(arguments.seed)
    each = -(-arguments.bank_size // len(images))
    progress = _progress(len(images), f"patches of {said}, training images")
    values, classes = [], []
    for index in range(len(images)):
        progress.update(index + 1)
        found = _read(images, encoder, index, instances=arguments.instances)
        if found is None:
            continue
        pixels, truth = found
        spare = [max(0, length - side) + 1 for length, side in zip(truth.shape, window, strict=True)]
        top, left = (int(torch.randint(one, (), generator=generator)) for one in spare)
        cut = _padded(pixels[:, top : top + window[0], left : left + window[1]], window, 0.0)
        own = _padded(truth[top : top + window[0], left : left + window[1]], window, IGNORED)
        labels = classes_of_patches(own, *grid, num_classes).flatten()
        order = torch.randperm(len(labels), generator=generator)
        chosen = order[labels[order] != IGNORED][:each]
        values.append(describe(cut[None])[0].flatten(0, 1)[chosen])
        classes.append(labels[chosen])
    progress.close()
    if not values:
        raise InputError(f"`train_split`: expected readable images, {none_readable(images.source)}.")
    drawn = torch.cat(classes)
    if len(drawn.unique()) < 2:
        raise InputError(
            f"`image_height`: expected patches of at least 2 classes, those {len(drawn)} drawn from windows of "
            f"{window[0]}x{window[1]} pixels have one or none, each by most of its pixels; raise --image_height, "
            "--image_width and --bank_size, or take a model of smaller patches."
        )
    return Patches(torch.cat(values), drawn)


def scored(
    images: AnnotatedImages,
    describe: Describe,
    encoder: VisionEncoder,
    scorers: dict[str, Describe],
    num_classes: int,
    said: str,
    arguments: DenseArguments,
) -> dict[str, np.ndarray]:
    """Return for each scorer `(classes, classes)` counts of the test images' pixels, by true and by found class.

    Args:
        images: To test on.
        describe: What makes patches of windows.
        encoder: Whose image processor makes the windows' pixels.
        scorers: Each turns patches `(n, size)` into scores `(n, classes)`.
        num_classes: That there are.
        said: For the progress.
        arguments: The flags.

    Raises:
        InputError: No readable image.
    """
    window = (arguments.image_height, arguments.image_width)
    totals = {name: np.zeros((num_classes, num_classes), np.int64) for name in scorers}
    progress = _progress(len(images), f"patches of {said}, test images")
    readable = 0
    for index in range(len(images)):
        progress.update(index + 1)
        found = _read(images, encoder, index, instances=arguments.instances)
        if found is None:
            continue
        readable += 1
        pixels, truth = found
        height, width = truth.shape
        places = [(top, left) for top in _tiles(height, window[0]) for left in _tiles(width, window[1])]
        cut = [_padded(pixels[:, y : y + window[0], x : x + window[1]], window, 0.0) for y, x in places]
        patches = torch.cat([describe(torch.stack(some)) for some in _some(cut)])
        for name, score in scorers.items():
            scores = score(patches.flatten(0, 2)).float().view(*patches.shape[:3], num_classes).permute(0, 3, 1, 2)
            guessed = torch.zeros(max(height, window[0]), max(width, window[1]), dtype=torch.int64)
            for (y, x), own in zip(places, scores, strict=True):
                magnified = F.interpolate(own[None], window, mode="bilinear")[0]
                guessed[y : y + window[0], x : x + window[1]] = magnified.argmax(0)
            totals[name] += confusion(truth.numpy(), guessed[:height, :width].numpy(), num_classes)
    progress.close()
    if not readable:
        raise InputError(f"`test_split`: expected readable images, {none_readable(images.source)}.")
    return totals


def summary_of(counts: np.ndarray, names: list[str]) -> dict[str, float]:
    """Return pixel accuracy, mean IoU, and the mean Dice of all classes but the first, of those in the truth."""
    scores = class_scores(counts, names)
    dice = [one["dice"] for name, one in scores.items() if name != names[0]]
    return {
        "pixel_accuracy": float(np.trace(counts) / max(1, counts.sum())),
        "mean_iou": sum(one["iou"] for one in scores.values()) / max(1, len(scores)),
        "dice": sum(dice) / max(1, len(dice)),
    }


def _read(
    images: AnnotatedImages, encoder: VisionEncoder, index: int, *, instances: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return normalised pixels `(channels, height, width)` at their own size and their classes; None if unreadable."""
    image = images.source.read(index)
    if image is None:
        return None
    flags = dict.fromkeys(("do_resize", "do_center_crop"), False)
    images_given, axes = arrays_of([image])
    pixels = encoder.processor(images_given, return_tensors="pt", **flags, **axes)["pixel_values"][0]
    mask = torch.from_numpy(read_mask(images.annotations[index]))
    return pixels, classes_of(mask, instances=instances)


def _voted(bank: Patches, neighbours: int, classes: int, values: torch.Tensor) -> torch.Tensor:
    k = min(neighbours, len(bank.classes))
    return votes_of(bank.values, bank.classes, values, neighbours=k, temperature=TEMPERATURE, classes=classes)


def _tiles(length: int, window: int) -> list[int]:
    """Return where windows begin that cover a length, the last one at its end."""
    return [min(start, max(0, length - window)) for start in range(0, length, window)]


def _some(windows: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [windows[start : start + WINDOWS_AT_ONCE] for start in range(0, len(windows), WINDOWS_AT_ONCE)]


def _padded(values: torch.Tensor, window: tuple[int, int], fill: float) -> torch.Tensor:
    height, width = values.shape[-2:]
    return F.pad(values, (0, window[1] - width, 0, window[0] - height), value=fill)


def _progress(count: int, said: str) -> Progress:
    progress = Progress(count, 0, shown=True, unit="image")
    progress.describe(said)
    return progress


def _print(name: str, num_test: int, num_classes: int, metrics: dict[str, float]) -> None:
    from hf_vicreg.model_cards.escaping import one_line

    print(f"\n{one_line(name)} on {num_test} test images with masks of {num_classes} classes\n")
    print(f"  {'':<18} {'':<7} {'pixels':>7} {'mIoU':>7} {'Dice':>7}")
    for way, said in (("pixels_", "raw pixels"), ("untrained_", "untrained encoder"), ("", "this encoder")):
        for kind in ("knn", "linear"):
            shown = (metrics[f"{way}{kind}_{one}"] for one in ("pixel_accuracy", "mean_iou", "dice"))
            print(f"  {said:<18} {kind:<7} " + " ".join(f"{one:7.3f}" for one in shown))
