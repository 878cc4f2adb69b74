"""`hf-vicreg finetune multitask`: tasks of a file in, one encoder and a whole model for each task out."""

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTModel
from hf_vicreg.training.errors import room_in
from hf_vicreg.training.evaluation.encoder import load_processor, public_name, quiet_transformers
from hf_vicreg.training.evaluation.labelled import count_overlap
from hf_vicreg.training.evaluation.results import FILE, describe_data
from hf_vicreg.training.launch.distributed import build_accelerator
from hf_vicreg.training.tasks.arguments import (
    CaptioningArguments,
    DetectionArguments,
    LabelArguments,
    MultitaskArguments,
    SegmentationArguments,
    check_run,
    output_folder,
    settings_of,
)
from hf_vicreg.training.tasks.backbone import pretrained_encoder
from hf_vicreg.training.tasks.captioning.command import prepare_captioning
from hf_vicreg.training.tasks.detection.command import prepare_detection
from hf_vicreg.training.tasks.multitask.label_heads import prepare_labels
from hf_vicreg.training.tasks.multitask.labels import refuse_unseen
from hf_vicreg.training.tasks.multitask.model import MultitaskModel
from hf_vicreg.training.tasks.multitask.step import MultitaskStep, batch_shares
from hf_vicreg.training.tasks.multitask.tasks_file import CLASSES, NUMBERS, SEVERAL, Task, of_task, read_tasks
from hf_vicreg.training.tasks.prepared import PreparedTask
from hf_vicreg.training.tasks.segmentation.command import prepare_segmentation
from hf_vicreg.training.tasks.segmentation.masks import IGNORED, classes_of, read_mask
from hf_vicreg.training.tasks.training import fine_tune, save_tuned, tuned_record, tuning_loop

logger = logging.getLogger(__name__)

HEADS = "heads"
AUTO_CLASSES = {
    **dict.fromkeys((CLASSES, SEVERAL, NUMBERS), "AutoModelForImageClassification"),
    "detection": "AutoModelForObjectDetection",
    "segmentation": "AutoModelForSemanticSegmentation",
    "captioning": "VisionEncoderDecoderModel",
}


def finetune_multitask(path: str, arguments: MultitaskArguments) -> dict[str, Any]:
    """Train an encoder for several tasks at once; leave it in a folder, and a whole model for each task below `heads`.

    Args:
        path: `TASKS.yaml`.
        arguments: The flags.

    Returns:
        The entry of `results.json`.

    Raises:
        InputError: Bad input; nothing has been overwritten.
    """
    started = time.perf_counter()
    check_run(arguments)
    model_name, listed = read_tasks(path, arguments)
    folder = output_folder(arguments)
    # a decoder has no use for some of the encoder's parameters that a classifier reads, nor others the other way
    accelerator = build_accelerator(arguments.mixed_precision, find_unused_parameters=True)
    with of_task("model"):
        encoder = pretrained_encoder(BigBirdViTModel, model_name, seed=arguments.seed)
    processor = load_processor(model_name, encoder.config, "model")
    # those left out by `only` are read as well: shares of a step are of all
    tasks = {task.name: prepare(model_name, task, accelerator) for task in listed}
    sizes = {name: task.num_images for name, task in tasks.items()}
    shares = batch_shares(sizes, arguments.batch_size, arguments.temperature, accelerator.num_processes)
    chosen = [task for task in listed if arguments.only in (None, task.name)]
    tasks = {one.name: tasks[one.name] for one in chosen}
    model = MultitaskModel(
        encoder,
        {name: task.model for name, task in tasks.items()},
        {name: task.loss_scale for name, task in tasks.items()},
        {one.name: 0.5 if one.kind == NUMBERS else 1.0 for one in chosen},
        {one.name: one.weight for one in chosen} if arguments.weighting == "fixed" else None,
    )
    digests = {name: task.weights for name, task in tasks.items()}
    recipe = settings_of(arguments) | {"tasks": {one.name: _told(one) for one in chosen}, "weights": digests}
    step = MultitaskStep(model, tasks, shares, arguments, accelerator, num_images=sum(sizes.values()))
    whole = hashlib.sha256(str([task.train.fingerprint for task in tasks.values()]).encode()).hexdigest()[:16]
    loop = tuning_loop(step, arguments, accelerator, recipe, whole, folder, lambda: _measured(tasks))
    said = ", ".join(f"{name} {shares[name]} of {task.num_images}" for name, task in tasks.items())
    fine_tune(loop, arguments, model_name, recipe, f"images a step: {said}")
    for task in tasks.values():
        task.finish()
    metrics = _measured(tasks)
    loop.note(metrics)
    record = tuned_record(
        "finetune_multitask",
        loop,
        encoder,
        processor,
        feature="features",
        data=_described(chosen, tasks),
        settings=settings_of(arguments),
        metrics=metrics,
        details={
            "pretrained_model": public_name(model_name),
            "tasks": {
                one.name: {
                    **_told(one),
                    "images_a_step": shares[one.name],
                    "loss_weight": model.present_weights()[one.name].item(),
                    "folder": f"{HEADS}/{one.name}",
                }
                for one in chosen
            },
        },
        pictures=[],
        started=started,
    )
    if accelerator.is_main_process:
        with room_in(folder):
            _save(folder, record, encoder, processor, tasks)
        _report(folder, chosen, metrics)
    accelerator.wait_for_everyone()
    return record


def prepare(model_name: str, task: Task, accelerator: Accelerator) -> PreparedTask:
    """Return a task's model and data.

    Raises:
        InputError: No such data, no such model for it, or a class that no training image has.
    """
    arguments = task.arguments
    logger.info("task %s", task.name)
    with of_task(task.name):
        if isinstance(arguments, DetectionArguments):
            prepared = prepare_detection(model_name, arguments, accelerator)[0]
            seen = set(torch.cat([one.categories for one in prepared.train.annotations]).tolist())
            refuse_unseen(prepared.facts["class_names"], seen, "objects_column_name")
        elif isinstance(arguments, SegmentationArguments):
            prepared = prepare_segmentation(model_name, arguments, accelerator)[0]
            if not arguments.instances:
                masks = (torch.from_numpy(read_mask(one)) for one in prepared.train.annotations)
                seen = {value for mask in masks for value in classes_of(mask, instances=False).unique().tolist()}
                refuse_unseen(prepared.facts["class_names"], seen - {IGNORED}, "mask_column_name")
        elif isinstance(arguments, CaptioningArguments):
            prepared = prepare_captioning(model_name, arguments, accelerator)[0]
        else:
            assert isinstance(arguments, LabelArguments)
            prepared = prepare_labels(model_name, task.kind, arguments, accelerator)
    return prepared


def _told(task: Task) -> dict[str, Any]:
    """Return a task's settings; where its data lies on this machine is nobody's business."""
    return task.settings | {"dataset_name": public_name(task.arguments.dataset_name)}


def _measured(tasks: dict[str, PreparedTask]) -> dict[str, float]:
    """Return the figures of all tasks, each after its task's name; every process must call."""
    return {f"{name}.{key}": one for name, task in tasks.items() for key, one in task.measure().items()}


def _described(listed: list[Task], tasks: dict[str, PreparedTask]) -> dict[str, Any]:
    """Return what `results.json` says of the data: of each task, and in sum."""
    parts = {}
    for one in listed:
        task = tasks[one.name]
        overlap = count_overlap(task.train.digests, task.test.digests)
        parts[one.name] = describe_data(one.arguments, task.train, task.test, overlap, **task.facts)
    return {
        "dataset": ", ".join(dict.fromkeys(part["dataset"] for part in parts.values())),
        "num_train": sum(part["num_train"] for part in parts.values()),
        "num_test": sum(part["num_test"] for part in parts.values()),
        "test_images_in_train": sum(part["test_images_in_train"] for part in parts.values()),
        "tasks": parts,
    }


def _save(folder: Path, record: dict[str, Any], encoder: Any, processor: Any, tasks: dict[str, PreparedTask]) -> None:
    for name, task in tasks.items():
        head = folder / HEADS / name
        head.mkdir(parents=True, exist_ok=True)
        with quiet_transformers():
            task.model.save_pretrained(head)
        for companion in (task.processor, *task.companions):
            companion.save_pretrained(head)
    save_tuned(folder, record, encoder, processor)


def _report(folder: Path, listed: list[Task], metrics: dict[str, float]) -> None:
    print(f"\n{', '.join(f'{name} {value:.3f}' for name, value in metrics.items())}, in {folder / FILE}.")
    print("The encoder is in the folder itself, with AutoModel. To use the heads:\n")
    print("import hf_vicreg; import transformers\n")
    for one in listed:
        print(f'{one.name} = transformers.{AUTO_CLASSES[one.kind]}.from_pretrained("{folder / HEADS / one.name}")')
