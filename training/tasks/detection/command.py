"""`hf-vicreg finetune detection`: a pretrained encoder and images with boxes in, a detector's folder out."""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import (
    load_config,
    load_processor,
    public_name,
    source_for,
    weights_digest,
)
from hf_vicreg.training.evaluation.labelled import count_overlap
from hf_vicreg.training.evaluation.results import FILE, describe_data
from hf_vicreg.training.images.channels.raster import as_picture
from hf_vicreg.training.launch.distributed import build_accelerator
from hf_vicreg.training.monitor.run_log import LOG_FILE, read_log
from hf_vicreg.training.tasks.arguments import DetectionArguments, check_task, settings_of
from hf_vicreg.training.tasks.backbone import normalised, ranges_of
from hf_vicreg.training.tasks.data import AnnotatedImages
from hf_vicreg.training.tasks.detection.box_drawing import draw_boxes, draw_found
from hf_vicreg.training.tasks.detection.coco_map import check_extra, mean_average_precision
from hf_vicreg.training.tasks.detection.data import CanvasSampler, DetectionViews, load_detection
from hf_vicreg.training.tasks.detection.model import (
    build_detector,
    build_detector_processor,
    centre_features,
    find_boxes,
    learning_rate_scale,
)
from hf_vicreg.training.tasks.prepared import PreparedTask
from hf_vicreg.training.tasks.training import ModelLossStep, fine_tune, save_tuned, tuned_record, tuning_loop

logger = logging.getLogger(__name__)

PICTURE = "detections.png"
NUM_DRAWN = 4
NUM_CENTRING = 8  # images from which the mean of the encoder's features is taken
DRAWN_SCORE = 0.4  # lower ones are left out of the picture
NOTHING = {"scores": torch.empty(0), "labels": torch.empty(0, dtype=torch.int64), "boxes": torch.empty(0, 4)}
LOADING_SNIPPET = """\
hf-vicreg detect {folder} IMAGE --output detections

import hf_vicreg; from transformers import pipeline
detect = pipeline("object-detection", "{folder}")"""
OF_CHANNELS_SNIPPET = """\
hf-vicreg detect {folder} IMAGE --output detections

import hf_vicreg
from transformers import AutoImageProcessor, AutoModelForObjectDetection

processor = AutoImageProcessor.from_pretrained("{folder}")
model = AutoModelForObjectDetection.from_pretrained("{folder}")
outputs = model(**processor("IMAGE", return_tensors="pt"))
found = processor.post_process_object_detection(outputs, target_sizes=[(HEIGHT, WIDTH)])"""


def finetune_detection(model_name: str, arguments: DetectionArguments) -> dict[str, Any]:
    """Fine-tune a detector, measure COCO's mean average precision, leave a folder that transformers loads.

    Args:
        model_name: Folder or Hub id of the pretrained encoder.
        arguments: The flags.

    Returns:
        The entry of `results.json`.

    Raises:
        InputError: Bad input; nothing has been overwritten.
    """
    started = time.perf_counter()
    folder = check_task(arguments)
    accelerator = build_accelerator(arguments.mixed_precision)
    task, tester = prepare_detection(model_name, arguments, accelerator)
    train, test, processor, class_names = task.train, task.test, task.processor, tester.class_names
    overlap = count_overlap(train.digests, test.digests)
    recipe = settings_of(arguments) | {"weights": task.weights}
    step = ModelLossStep(task, arguments, accelerator)
    loop = tuning_loop(step, arguments, accelerator, recipe, train.fingerprint, folder, task.measure)
    height, width = processor.pad_size["height"], processor.pad_size["width"]
    fine_tune(loop, arguments, model_name, recipe, f"{len(train)} training images of {height}x{width} pixels")
    metrics, by_class, predictions = tester.measure()
    loop.note(metrics)
    record = tuned_record(
        "finetune_detection",
        loop,
        step.model,
        processor,
        feature="boxes",
        data=describe_data(arguments, train, test, overlap, **task.facts),
        settings=settings_of(arguments),
        metrics=metrics,
        details={
            "pretrained_model": None if arguments.from_scratch else public_name(model_name),
            "classes": by_class,
            "unreadable_test_images": len(test) - len(predictions),
            "map_50_curve": _curve(folder) if accelerator.is_main_process else [],
        },
        pictures=[PICTURE],
        started=started,
    )
    if accelerator.is_main_process:
        _draw(folder / PICTURE, test, predictions, class_names, ranges_of(processor))
        save_tuned(folder, record, step.model, processor)
        print(f"\nmAP {metrics['map']:.3f}, mAP50 {metrics['map_50']:.3f} on {len(test)} images, in {folder / FILE}.")
        print(f"Boxes found are in {folder / PICTURE}. To use the detector:\n")
        snippet = LOADING_SNIPPET if ranges_of(processor)[0] is None else OF_CHANNELS_SNIPPET
        print(snippet.format(folder=folder))
    accelerator.wait_for_everyone()
    return record


def prepare_detection(
    model_name: str, arguments: DetectionArguments, accelerator: Accelerator
) -> tuple[PreparedTask, "Tester"]:
    """Return a detector and its data, ready for a step, and what measures it.

    Raises:
        InputError: No such data or model, or a package that is not installed.
    """
    check_extra()
    reader = load_processor(model_name, load_config(model_name))
    train, test, class_names = load_detection(arguments, partial(source_for, reader))
    model = build_detector(model_name, class_names, arguments)
    backbone_config = model.config.backbone_config
    processor = build_detector_processor(model_name, backbone_config, arguments.image_height, arguments.image_width)
    canvas = (processor.pad_size["height"], processor.pad_size["width"])
    plain = DetectionViews(train, CanvasSampler(canvas, 0.0, 0.0), arguments.seed)
    centring = collate([plain[0, index] for index in range(min(NUM_CENTRING, len(train)))])
    if centring is None:
        raise InputError("`train_split`: expected readable images, found too many corrupt ones; check them.")
    weights = weights_digest(model)  # before what another CPU rounds differently
    centre_features(model, model_inputs(processor, centring, model.device))
    tester = Tester(model, processor, test, class_names, accelerator, arguments.per_device_eval_batch_size)
    sampler = CanvasSampler(canvas, arguments.scale_jitter, arguments.flip_probability)
    task = PreparedTask(
        model,
        processor,
        train,
        test,
        DetectionViews(train, sampler, arguments.seed),
        collate,
        partial(model_inputs, processor),
        lambda name: learning_rate_scale(name, arguments.encoder_learning_rate_ratio),
        lambda: tester.measure()[0],
        weights,
        # transformers divides the number of boxes by that of processes though it has averaged it already
        loss_scale=1 / accelerator.num_processes,
        facts={
            "objects_column": arguments.objects_column_name,
            "num_classes": len(class_names),
            "class_names": class_names,
            "num_train_objects": sum(len(one.boxes) for one in train.annotations),
            "num_test_objects": sum(len(one.boxes) for one in test.annotations),
        },
    )
    return task, tester


def collate(samples: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return `pixels` `(batch, channels, height, width)`, `sizes` and `labels`; None if a sample is missing."""
    found = [sample for sample in samples if sample is not None]
    if len(found) < len(samples):
        return None
    return {
        "pixels": torch.stack([sample["pixels"] for sample in found]),
        "sizes": [sample["size"] for sample in found],
        "labels": [{key: sample[key] for key in ("class_labels", "boxes")} for sample in found],
    }


def model_inputs(processor: BaseImageProcessor, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return what a detector takes of a batch: normalised as the processor does it, 0 where padded, on the device."""
    pixels = normalised(processor, batch["pixels"].to(device, non_blocking=True))
    pixel_mask = torch.zeros(len(pixels), *pixels.shape[-2:], dtype=torch.int64, device=device)
    for mask, (height, width) in zip(pixel_mask, batch["sizes"], strict=True):
        mask[:height, :width] = 1
    return {
        "pixel_values": pixels * pixel_mask[:, None],
        "pixel_mask": pixel_mask,
        "labels": [{key: one.to(device) for key, one in labels.items()} for labels in batch["labels"]],
    }


def _curve(folder: Path) -> list[tuple[int, float]]:
    """Return mAP50 over the steps that have a line of the log with it."""
    return [(one["step"], one["map_50"]) for one in read_log(folder / LOG_FILE) if "map_50" in one]


class Tester:
    """Finds and measures boxes on the test images, an equal share on each process."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        images: AnnotatedImages,
        class_names: list[str],
        accelerator: Accelerator,
        batch_size: int,
    ):
        self.model, self.processor, self.images, self.class_names = model, processor, images, class_names
        self.accelerator, self.batch_size = accelerator, batch_size

    def measure(self) -> tuple[dict[str, float], dict[str, dict[str, float]], dict[int, dict[str, torch.Tensor]]]:
        """Return COCO's figures, those of each class, and the boxes found by index of the image.

        Unreadable images count with nothing found on them. Every process must call.

        Raises:
            InputError: Not one image can be read.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        indices = list(range(rank, len(self.images), processes))
        found = []
        for start in range(0, len(indices), self.batch_size):
            read = [(index, self.images.source.read(index)) for index in indices[start : start + self.batch_size]]
            kept = [(index, image) for index, image in read if image is not None]
            if kept:
                boxes = find_boxes(self.model, self.processor, [image for _, image in kept], threshold=0.0)
                found += list(zip([index for index, _ in kept], boxes, strict=True))
        by_index = dict(gather_object(found) if processes > 1 else found)
        if not by_index:
            raise InputError(
                f"`test_split`: expected readable images in {self.images.split!r}, all are corrupt; check them."
            )
        metrics, by_class = mean_average_precision(
            [by_index.get(index, NOTHING) for index in range(len(self.images))],
            self.images.annotations,
            self.class_names,
        )
        return metrics, by_class, by_index


def _draw(
    path: Path,
    images: AnnotatedImages,
    found: dict[int, dict[str, torch.Tensor]],
    class_names: list[str],
    ranges: tuple[Any, Any],
) -> None:
    """Write a picture of the first test images: on the left what is annotated, on the right what was found."""
    rows = []
    for index in sorted(found)[:NUM_DRAWN]:
        read, objects, boxes = images.source.read(index), images.annotations[index], found[index]
        assert read is not None
        image = as_picture(read, *ranges)
        corners = torch.cat([objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]], dim=1)
        labels = objects.categories.tolist()
        truth = draw_boxes(image, corners.tolist(), labels, [class_names[label] for label in labels])
        boxes = {key: one[found[index]["scores"] >= DRAWN_SCORE] for key, one in boxes.items()}
        rows.append((truth, draw_found(image, boxes, class_names)))
    width = max(2 * left.width for left, _ in rows)
    canvas = Image.new("RGB", (width, sum(left.height for left, _ in rows)), "white")
    top = 0
    for left, right in rows:
        canvas.paste(left, (0, top))
        canvas.paste(right, (left.width, top))
        top += left.height
    canvas.save(path)
