"""`hf-vicreg finetune detection|segmentation|captioning|multitask`, `detect`, `segment`: flags; work comes later."""

import argparse
from typing import Any

from hf_vicreg.evaluation_commands import add_command, run_task
from hf_vicreg.training.errors import log_to_stderr, place_for
from hf_vicreg.training.tasks.arguments import (
    CaptioningArguments,
    DetectionArguments,
    MultitaskArguments,
    SegmentationArguments,
)

DETECTION_EXAMPLE = (
    "hf-vicreg finetune detection runs/mine --dataset_name my_boxes --output_dir runs/detector --image_height 240 "
    "--image_width 320 --num_train_epochs 2"
)
SEGMENTATION_EXAMPLE = (
    "hf-vicreg finetune segmentation runs/mine --dataset_name my_masks --output_dir runs/segmenter --image_height 64 "
    "--image_width 64 --num_train_epochs 2"
)
CAPTIONING_EXAMPLE = (
    "hf-vicreg finetune captioning runs/mine --dataset_name my_captions --output_dir runs/captioner "
    "--num_train_epochs 2"
)
MULTITASK_EXAMPLE = "hf-vicreg finetune multitask tasks.yaml --output_dir runs/three --num_train_epochs 2"
DETECT_EXAMPLE = "hf-vicreg detect runs/detector my_photo.jpg --output detections"
SEGMENT_EXAMPLE = "hf-vicreg segment runs/segmenter my_photo.jpg --output segments"


def add_tasks(verbs: Any, tasks: Any) -> None:
    """Add `detect` and `segment` to the command's sub-parsers and four tasks to those of `finetune`."""
    add_command(
        tasks,
        "detection",
        DetectionArguments,
        "a detector of objects",
        DETECTION_EXAMPLE,
        _finetune_detection,
        model="folder or Hub id of a BigBirdViT",
    )
    add_command(
        tasks,
        "segmentation",
        SegmentationArguments,
        "a segmenter, which finds the class of each pixel",
        SEGMENTATION_EXAMPLE,
        _finetune_segmentation,
        model="folder or Hub id of a BigBirdViT",
    )
    add_command(
        tasks, "captioning", CaptioningArguments, "a writer of captions", CAPTIONING_EXAMPLE, _finetune_captioning
    )
    multitask = add_command(
        tasks,
        "multitask",
        MultitaskArguments,
        "one encoder with a head for each of several tasks, trained together",
        MULTITASK_EXAMPLE,
        _finetune_multitask,
        model="",
    )
    multitask.add_argument("model", metavar="TASKS", help="YAML file with `model`, the encoder, and a list of `tasks`")
    detect = verbs.add_parser(
        "detect",
        help="objects on images, found by a fine-tuned detector",
        epilog=f"example:\n  {DETECT_EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    detect.add_argument("model", metavar="MODEL", help="folder or Hub id of a detector")
    detect.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    detect.add_argument("--output", help="folder for the images with their boxes drawn; default: lines alone")
    detect.add_argument("--threshold", type=float, default=0.5, help="least score of a box (default: 0.5)")
    detect.set_defaults(run=_detect)
    segment = verbs.add_parser(
        "segment",
        help="masks of images of any size, found by a fine-tuned segmenter",
        epilog=f"example:\n  {SEGMENT_EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    segment.add_argument("model", metavar="MODEL", help="folder or Hub id of a segmenter")
    segment.add_argument("images", metavar="IMAGE", nargs="+", help="image files, and folders of them")
    segment.add_argument("--output", required=True, help="folder for masks and overlays")
    segment.set_defaults(run=_segment)


def _finetune_detection(parsed: argparse.Namespace) -> int:
    from hf_vicreg.training.tasks.detection.command import finetune_detection

    return run_task(finetune_detection, parsed)


def _finetune_segmentation(parsed: argparse.Namespace) -> int:
    from hf_vicreg.training.tasks.segmentation.command import finetune_segmentation

    return run_task(finetune_segmentation, parsed)


def _finetune_captioning(parsed: argparse.Namespace) -> int:
    from hf_vicreg.training.tasks.captioning.command import finetune_captioning

    return run_task(finetune_captioning, parsed)


def _finetune_multitask(parsed: argparse.Namespace) -> int:
    from hf_vicreg.training.tasks.multitask.command import finetune_multitask

    return run_task(finetune_multitask, parsed)


def _detect(parsed: argparse.Namespace) -> None:
    from hf_vicreg.training.tasks.detection.detect import detect

    log_to_stderr()
    with place_for("output", parsed.output or "."):
        detect(parsed.model, parsed.images, parsed.output, parsed.threshold)


def _segment(parsed: argparse.Namespace) -> None:
    from hf_vicreg.training.tasks.segmentation.segment import segment

    log_to_stderr()
    with place_for("output", parsed.output):
        segment(parsed.model, parsed.images, parsed.output)
