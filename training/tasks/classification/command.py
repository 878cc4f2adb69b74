"""`hf-vicreg finetune classification`: a pretrained encoder and labelled images in, a classifier's folder out."""

import dataclasses
import hashlib
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_vicreg.model_cards.results import labels_note
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import FinetuneArguments, TuningArguments, check_ranges
from hf_vicreg.training.evaluation.encoder import load_processor, public_name, source_for, weights_digest
from hf_vicreg.training.evaluation.evaluate import MAX_STORED_CLASSES, settings_of, share_right
from hf_vicreg.training.evaluation.labelled import LabelledImages, count_overlap, load_labelled
from hf_vicreg.training.evaluation.pictures import can_draw, confusion_matrix, draw_confusion
from hf_vicreg.training.evaluation.results import FILE, describe_data, describe_labels
from hf_vicreg.training.images.sources import ImageSource, load_sources
from hf_vicreg.training.run.run_folder import refuse_foreign_folder
from hf_vicreg.training.tasks.classification.data import LABELLED, UNLABELLED
from hf_vicreg.training.tasks.classification.model import build_classifier, classifier_accelerator
from hf_vicreg.training.tasks.classification.training import ClassifierStep
from hf_vicreg.training.tasks.training import fine_tune, save_tuned, tuned_record, tuning_loop

logger = logging.getLogger(__name__)

OWN_FILE = "finetuning.json"  # what a folder has to hold to be taken for a classifier of ours
CONFUSION = "classifier_confusion.png"
LOADING_SNIPPET = """\
import hf_vicreg; from transformers import pipeline
classify = pipeline("image-classification", "{folder}")"""


def finetune_classification(model_name: str, arguments: FinetuneArguments) -> dict[str, Any]:
    """Fine-tune a classifier, test it, and leave a folder that `pipeline("image-classification")` takes.

    Args:
        model_name: Folder or Hub id of the pretrained encoder.
        arguments: The flags.

    Returns:
        The entry of `results.json`.

    Raises:
        InputError: Bad input; nothing has been overwritten.
    """
    started = time.perf_counter()
    check_ranges(arguments)
    folder = Path(arguments.output_dir)
    _check_folder(arguments)
    train, test = load_labelled(arguments)
    trained_on = train.digests
    sources = training_sources(train, arguments.labels_per_class, arguments.seed)
    if not arguments.consistency:
        del sources[UNLABELLED]
    elif arguments.unlabelled_dir is not None:
        sources[UNLABELLED], _ = load_sources(train_dir=arguments.unlabelled_dir)
        trained_on = trained_on + LabelledImages(UNLABELLED, sources[UNLABELLED], []).digests
    overlap = count_overlap(trained_on, test.digests)
    accelerator = classifier_accelerator(model_name, arguments.mixed_precision)
    model = build_classifier(model_name, train.class_names, from_scratch=arguments.from_scratch, seed=arguments.seed)
    processor = load_processor(model_name, model.config)
    sources = {kind: source_for(processor, one) for kind, one in sources.items()}
    test = replace(test, source=source_for(processor, test.source))
    encoder_weights = weights_digest(model.base_model)
    recipe = settings_of(arguments) | {"weights": weights_digest(model)}
    step = ClassifierStep(model, processor, tuning_from(arguments), sources, accelerator, seed=arguments.seed)
    loop = tuning_loop(step, arguments, accelerator, recipe, _fingerprint(sources), folder)
    fine_tune(loop, arguments, model_name, recipe, f"{len(sources[LABELLED])} labelled images")
    predictions, labels = step.predict(test.source, arguments.per_device_eval_batch_size)
    accuracy = share_right(predictions, labels)
    num_classes = len(train.class_names)
    counts = confusion_matrix(labels, predictions, num_classes) if num_classes <= MAX_STORED_CLASSES else None
    details: dict[str, Any] = {
        "pretrained_model": None if arguments.from_scratch else public_name(model_name),
        "pretrained_weights": None if arguments.from_scratch else encoder_weights,
        "num_labelled": len(sources[LABELLED]),
        "unlabelled": sources[UNLABELLED].name if UNLABELLED in sources else None,
        "num_unlabelled": len(sources[UNLABELLED]) if UNLABELLED in sources else 0,
    }
    if counts is not None:
        details["confusion"] = counts.tolist()
    pictures = [CONFUSION] if counts is not None and can_draw() else []
    record = tuned_record(
        "finetune_classification",
        loop,
        step.model,
        processor,
        feature="logits",
        data=describe_data(
            arguments,
            train,
            test,
            overlap,
            **describe_labels(arguments, train, test),
        ),
        settings=settings_of(arguments),
        metrics={"accuracy": accuracy},
        details=details,
        pictures=pictures,
        started=started,
    )
    if accelerator.is_main_process:
        save_tuned(folder, record, step.model, processor)
        if counts is not None and pictures:
            draw_confusion(folder / CONFUSION, counts, train.class_names, f"{folder.resolve().name}: {accuracy:.3f}")
        images = f"{len(labels)} test images{labels_note(record['data'])}"
        print(f"\nAccuracy {accuracy:.3f} on {images}, in {folder / FILE}. To use the classifier:\n")
        print(LOADING_SNIPPET.format(folder=folder))
    accelerator.wait_for_everyone()
    return record


def training_sources(train: LabelledImages, labels_per_class: int | None, seed: int) -> dict[str, ImageSource]:
    """Return the labelled images, all or so many of each class, and all of them as unlabelled ones.

    Raises:
        InputError: Not so many images of a class.
    """
    few = train if labels_per_class is None else train.select(train.draw(labels_per_class, seed))
    return {LABELLED: few.source, UNLABELLED: replace(train.source, labels=None)}


def tuning_from(arguments: TuningArguments) -> TuningArguments:
    """Return the flags of fine-tuning alone; a model without pretrained layers has none to protect by a decay."""
    own = {one.name: getattr(arguments, one.name) for one in dataclasses.fields(TuningArguments)}
    if getattr(arguments, "from_scratch", False):
        own["layer_decay"] = 1.0
    return TuningArguments(**own)


def _fingerprint(sources: dict[str, ImageSource]) -> str:
    """Changes with images, their order and their labels."""
    parts = [(kind, source.fingerprint, source.labels) for kind, source in sorted(sources.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _check_folder(arguments: FinetuneArguments) -> None:
    if not arguments.output_dir:
        raise InputError("`output_dir`: expected a folder for the classifier, got none; add --output_dir FOLDER.")
    if arguments.unlabelled_dir is not None and not arguments.consistency:
        raise InputError("`unlabelled_dir`: expected --consistency beside it, which alone uses unlabelled images.")
    if arguments.from_scratch and arguments.freeze_encoder:
        raise InputError(
            "`freeze_encoder`: expected pretrained weights, got --from_scratch; leave one of the two out."
        )
    resuming = arguments.resume_from_checkpoint is not None
    refuse_foreign_folder(Path(arguments.output_dir), OWN_FILE, resuming=resuming)
