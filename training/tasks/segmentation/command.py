"""`hf-vicreg finetune segmentation`: a pretrained encoder and images with masks in, a segmenter's folder out."""

import logging
import time
from functools import partial
from typing import Any

from accelerate import Accelerator

from hf_vicreg.training.evaluation.encoder import (
    load_config,
    load_processor,
    public_name,
    source_for,
    weights_digest,
)
from hf_vicreg.training.evaluation.labelled import count_overlap
from hf_vicreg.training.evaluation.results import FILE, describe_data
from hf_vicreg.training.launch.distributed import build_accelerator
from hf_vicreg.training.tasks.arguments import SegmentationArguments, check_task, settings_of
from hf_vicreg.training.tasks.prepared import PreparedTask
from hf_vicreg.training.tasks.segmentation.data import CropSampler, SegmentationViews, collate, load_segmentation
from hf_vicreg.training.tasks.segmentation.masks import check_extra
from hf_vicreg.training.tasks.segmentation.model import (
    build_segmenter,
    build_segmenter_processor,
    learning_rate_scale,
    model_inputs,
)
from hf_vicreg.training.tasks.segmentation.scoring import Tester
from hf_vicreg.training.tasks.training import ModelLossStep, fine_tune, save_tuned, tuned_record, tuning_loop

logger = logging.getLogger(__name__)

PICTURE = "segments.png"
LOADING_SNIPPET = """\
hf-vicreg segment {folder} IMAGE --output segments

import hf_vicreg
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained("{folder}")
model = AutoModelForSemanticSegmentation.from_pretrained("{folder}")"""


def finetune_segmentation(model_name: str, arguments: SegmentationArguments) -> dict[str, Any]:
    """Fine-tune a segmenter, measure it on the test images, leave a folder that transformers loads.

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
    task, tester = prepare_segmentation(model_name, arguments, accelerator)
    train, test, processor, class_names = task.train, task.test, task.processor, tester.class_names
    overlap = count_overlap(train.digests, test.digests)
    recipe = settings_of(arguments) | {"weights": task.weights}
    step = ModelLossStep(task, arguments, accelerator)
    loop = tuning_loop(step, arguments, accelerator, recipe, train.fingerprint, folder, task.measure)
    fine_tune(loop, arguments, model_name, recipe, f"{len(train)} training images, {len(class_names)} classes")
    metrics, details = tester.measure()
    loop.note(metrics)
    record = tuned_record(
        "finetune_segmentation",
        loop,
        step.model,
        processor,
        feature="masks",
        data=describe_data(arguments, train, test, overlap, **task.facts),
        settings=settings_of(arguments),
        metrics=metrics,
        details={"pretrained_model": None if arguments.from_scratch else public_name(model_name), **details},
        pictures=[PICTURE],
        started=started,
    )
    if accelerator.is_main_process:
        tester.draw(folder / PICTURE)
        save_tuned(folder, record, step.model, processor)
        figures = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        print(f"\n{figures} on {len(test)} images, in {folder / FILE}.")
        print(f"Masks given and found are in {folder / PICTURE}. To use the segmenter:\n")
        print(LOADING_SNIPPET.format(folder=folder))
    accelerator.wait_for_everyone()
    return record


def prepare_segmentation(
    model_name: str, arguments: SegmentationArguments, accelerator: Accelerator
) -> tuple[PreparedTask, Tester]:
    """Return a segmenter and its data, ready for a step, and what measures it.

    Raises:
        InputError: No such data or model, or a package that is not installed.
    """
    if arguments.instances:
        check_extra()
    reader = load_processor(model_name, load_config(model_name))
    train, test, class_names = load_segmentation(arguments, partial(source_for, reader))
    model = build_segmenter(model_name, class_names, arguments)
    size = (arguments.image_height, arguments.image_width)
    processor = build_segmenter_processor(model_name, model.config.backbone_config, *size)
    window = (processor.size["height"], processor.size["width"])
    if window != size:
        logger.info("windows of %dx%d pixels instead of %dx%d: a whole number of patches", *window, *size)
    sampler = CropSampler(
        window, arguments.scale_jitter, arguments.flip_probability, quarter_turns=arguments.quarter_turns
    )
    tester = Tester(model, processor, test, class_names, accelerator, arguments)
    task = PreparedTask(
        model,
        processor,
        train,
        test,
        SegmentationViews(train, sampler, arguments.seed, instances=arguments.instances),
        collate,
        partial(model_inputs, processor),
        lambda name: learning_rate_scale(name, arguments.encoder_learning_rate_ratio),
        lambda: tester.measure()[0],
        weights_digest(model),
        facts={
            "mask_column": arguments.mask_column_name,
            "num_classes": len(class_names),
            "class_names": class_names,
        },
    )
    return task, tester
