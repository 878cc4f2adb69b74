"""What a segmenter finds on the test images, measured and drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.channels.raster import as_picture
from hf_vicreg.training.tasks.arguments import SegmentationArguments
from hf_vicreg.training.tasks.backbone import ranges_of
from hf_vicreg.training.tasks.data import AnnotatedImages
from hf_vicreg.training.tasks.segmentation.mask_drawing import draw_mask, draw_objects
from hf_vicreg.training.tasks.segmentation.masks import classes_of, objects_of, read_mask
from hf_vicreg.training.tasks.segmentation.measures import (
    average_precision,
    class_scores,
    confusion,
    object_counts,
)
from hf_vicreg.training.tasks.segmentation.model import find_classes

NUM_DRAWN = 4


class Tester:
    """Finds and measures masks on the test images, an equal share on each process."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        images: AnnotatedImages,
        class_names: list[str],
        accelerator: Accelerator,
        arguments: SegmentationArguments,
    ):
        """Take what is measured, and how."""
        self.model, self.processor, self.images, self.class_names = model, processor, images, class_names
        self.accelerator, self.arguments = accelerator, arguments

    def measure(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Return figures over the pixels of all test images, and what stands behind them; every process must call.

        `mean_iou` is the mean over classes that occur. `dice` is the mean over them without background; with instances
        it is that of objects, interior and border taken together, and `ap_50` is that of `average_precision`.

        Raises:
            InputError: Not one image can be read, or no pixel of a class.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        measured = [self._measured(index) for index in range(rank, len(self.images), processes)]
        measured = gather_object(measured) if processes > 1 else measured
        read = [one for one in measured if one is not None]
        counts = np.sum([one[0] for one in read], axis=0, initial=0)
        if not np.any(counts):
            raise InputError(
                f"`test_split`: expected readable images with known classes in {self.images.split!r}, found none."
            )
        by_class = class_scores(counts, self.class_names)
        metrics = {"mean_iou": float(np.mean([one["iou"] for one in by_class.values()]))}
        details = {
            "classes": by_class,
            "confusion": counts.tolist(),
            "unreadable_test_images": len(measured) - len(read),
        }
        if self.arguments.instances:
            both = np.array([[counts[0, 0], counts[0, 1:].sum()], [counts[1:, 0].sum(), counts[1:, 1:].sum()]])
            metrics["dice"] = class_scores(both, ["background", "object"]).get("object", {"dice": 0.0})["dice"]
            metrics["ap_50"] = average_precision(np.array([one[1] for one in read]))
            details["objects"] = dict(
                zip(("found", "in_vain", "missed"), np.sum([one[1] for one in read], 0).tolist(), strict=True)
            )
            return metrics, details
        counted = [
            one["dice"]
            for name, one in by_class.items()
            if self.arguments.dice_of_background or name != self.class_names[0]
        ]
        metrics["dice"] = float(np.mean(counted)) if counted else 0.0
        return metrics, details

    def _measured(self, index: int) -> tuple[np.ndarray, tuple[int, int, int]] | None:
        """Return `confusion` and `object_counts` of an image, None of an unreadable one."""
        image = self.images.source.read(index)
        if image is None:
            return None
        found = self.find(image)
        mask, instances = read_mask(self.images.annotations[index]), self.arguments.instances
        truth = classes_of(torch.from_numpy(mask), instances=instances).numpy()
        counts = object_counts(mask, objects_of(found)) if instances else (0, 0, 0)
        return confusion(truth, found, len(self.class_names)), counts

    def find(self, image: Any) -> np.ndarray:
        """Return the class of each pixel."""
        size = self.arguments.per_device_eval_batch_size
        return find_classes(self.model, self.processor, image, size).numpy()

    def draw(self, path: Path) -> None:
        """Write a picture of the first test images: as they are, with the given mask, with the found one."""
        rows: list[list[Image.Image]] = []
        for index in range(len(self.images)):
            image = self.images.source.read(index)
            if image is not None and len(rows) < NUM_DRAWN:
                masks = [read_mask(self.images.annotations[index]), self.find(image)]
                picture = as_picture(image, *ranges_of(self.processor))
                if self.arguments.instances:
                    drawn = [draw_objects(picture, masks[0]), draw_objects(picture, objects_of(masks[1]))]
                else:
                    drawn = [draw_mask(picture, mask) for mask in masks]
                rows.append([picture, *drawn])
        canvas = Image.new("RGB", (max(3 * row[0].width for row in rows), sum(row[0].height for row in rows)), "white")
        top = 0
        for row in rows:
            for place, picture in enumerate(row):
                canvas.paste(picture, (place * picture.width, top))
            top += row[0].height
        canvas.save(path)
