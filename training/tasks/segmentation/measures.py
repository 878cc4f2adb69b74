"""How far masks agree: mean intersection over union, Dice, and AP50 of objects."""

from collections.abc import Sequence

import numpy as np

from hf_vicreg.training.tasks.segmentation.masks import IGNORED


def confusion(truth: np.ndarray, found: np.ndarray, num_classes: int) -> np.ndarray:
    """Return `(classes, classes)` int64: pixels by true and by found class, none whose truth is `IGNORED`."""
    known = truth != IGNORED
    pairs = truth[known].astype(np.int64) * num_classes + found[known]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_scores(counts: np.ndarray, class_names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return by name `iou` and `dice` of the classes that occur in the truth, over the pixels of all images.

    IoU is TP / (TP + FP + FN), Dice 2 TP / (2 TP + FP + FN).
    """
    hits, true, found = np.diag(counts), counts.sum(1), counts.sum(0)
    return {
        name: {
            "iou": float(hits[index] / (true[index] + found[index] - hits[index])),
            "dice": float(2 * hits[index] / (true[index] + found[index])),
        }
        for index, name in enumerate(class_names)
        if true[index] > 0
    }


def object_counts(truth: np.ndarray, found: np.ndarray) -> tuple[int, int, int]:
    """Return how many objects were found, found in vain and missed.

    An object is found by one whose intersection over union with it is more than a half: there is at most one.

    Args:
        truth: `(height, width)` whole numbers, objects from 1 on.
        found: The same.
    """
    _, true_numbers = np.unique(np.append(truth.ravel(), 0), return_inverse=True)
    _, found_numbers = np.unique(np.append(found.ravel(), 0), return_inverse=True)
    width = found_numbers.max() + 1
    # the appended pixel makes sure of a 0, the background, and counts nowhere: row and column 0 are left out
    shared = np.bincount(true_numbers * width + found_numbers, minlength=(true_numbers.max() + 1) * width)
    shared = shared.reshape(-1, width)
    either = shared.sum(1, keepdims=True) + shared.sum(0, keepdims=True) - shared
    matched = int((shared > 0.5 * either)[1:, 1:].sum())
    return matched, width - 1 - matched, shared.shape[0] - 1 - matched


def average_precision(counts: np.ndarray) -> float:
    """Return TP / (TP + FP + FN) of objects summed over images, 1 where there is none at all.

    Connected parts have no score to order them by; this is the average precision of the Data Science Bowl and of
    Schmidt et al. 2018, StarDist (arXiv 1806.03535), section 3.

    Args:
        counts: `(images, 3)` as `object_counts` gives them.
    """
    found, in_vain, missed = np.asarray(counts).reshape(-1, 3).sum(0)
    return float(found / max(found + in_vain + missed, 1)) if found + in_vain + missed else 1.0
