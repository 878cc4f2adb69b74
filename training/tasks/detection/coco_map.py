"""COCO's mean average precision, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.tasks.detection.data import Objects


def check_extra() -> None:
    """Check that what detection needs beside the package is there.

    Raises:
        InputError: It is not.
    """
    missing = [name for name in ("pycocotools", "scipy") if find_spec(name) is None]
    if missing:
        raise InputError(f"`detection`: expected {' and '.join(missing)}; pip install 'hf-vicreg[detection]'.")


def mean_average_precision(
    predictions: Sequence[dict[str, torch.Tensor]], truths: Sequence[Objects], class_names: Sequence[str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return COCO's figures, shares from 0 to 1, for all classes together and for each.

    Args:
        predictions: For each image `scores` `(boxes,)`, `labels` `(boxes,)` and `boxes` `(boxes, 4)`, which are left,
            top, right, bottom in pixels, as `post_process_object_detection` gives them.
        truths: For each image its objects.
        class_names: One for each class index.

    Returns:
        `map` (the mean over overlaps from 0.5 to 0.95), `map_50` and `map_75`; and by class name `ap` and `ap_50` of
        the classes that occur.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = [
        {"image_id": image, "bbox": box, "area": box[2] * box[3], "category_id": category, "iscrowd": 0}
        for image, objects in enumerate(truths)
        for box, category in zip(objects.boxes.tolist(), objects.categories.tolist(), strict=True)
    ]
    found = [
        {
            "image_id": image,
            "category_id": label,
            "score": score,
            "bbox": [left, top, right - left, bottom - top],
        }
        for image, one in enumerate(predictions)
        for score, label, (left, top, right, bottom) in zip(
            one["scores"].tolist(), one["labels"].tolist(), one["boxes"].tolist(), strict=True
        )
    ]
    if not found:
        return dict.fromkeys(("map", "map_50", "map_75"), 0.0), {}
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on every step
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(truths))],
            "annotations": [{"id": number} | one for number, one in enumerate(annotations, 1)],
            "categories": [{"id": index, "name": name} for index, name in enumerate(class_names)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = {key: float(evaluation.stats[place]) for place, key in enumerate(("map", "map_50", "map_75"))}
    precision: Any = evaluation.eval["precision"]  # (overlaps, recalls, classes, areas, numbers of detections)
    by_class = {
        name: {"ap": float(precision[:, :, index, 0, -1].mean()), "ap_50": float(precision[0, :, index, 0, -1].mean())}
        for index, name in enumerate(class_names)
        if precision[0, 0, index, 0, -1] >= 0  # -1 where the class does not occur
    }
    return metrics, by_class
