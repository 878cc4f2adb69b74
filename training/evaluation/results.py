"""`results.json`: what was measured, in one form for the card, the report and anybody's script.

The file is one object. A pretraining run writes its own fields there; evaluations are a list under `evaluations`, each

    task         "knn", "linear", "retrieval", "few_labels", "image_text", "finetune_classification",
                 "finetune_detection", "finetune_segmentation", "finetune_captioning" or "finetune_multitask", whose
                 `data` and `details` have a mapping `tasks`, and whose metrics are called `task.metric`
    model        name, model_type, parameters, weights (a hash of configuration and weights), feature, preprocessing
    data         dataset, config, splits, columns, numbers of images and classes, fingerprints of the images' bytes,
                 test_images_in_train (how many are byte for byte among the training images); of labels of a file,
                 labels_digest, and as both splits the one of the data set that the images are of
    settings     all flags that change a figure
    metrics      name to number; accuracies are shares from 0 to 1
    details      what stands behind the metrics: confusion counts, the C's tried, single runs
    pictures     files in the same folder, relative
    environment  hardware and versions
    date         UTC, ISO 8601
    seconds      of the evaluation, cached features included if they had to be made
"""

import contextlib
import datetime
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoModelForImageClassification

from hf_vicreg.model_cards.schema import FileError, check_results
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import LabelledDataArguments
from hf_vicreg.training.evaluation.encoder import load_weights, no_model, public_name, weights_digest
from hf_vicreg.training.evaluation.labelled import LabelledImages
from hf_vicreg.training.images.sources import ImageSource

FILE = "results.json"
EVALUATIONS = "evaluations"
SAME = ("task", "model", "data", "settings")  # an evaluation that agrees in these takes the place of an earlier one
PACKAGES = ("torch", "torchvision", "transformers", "datasets", "scikit-learn", "pillow")


class Split(Protocol):
    """Images of a split, as `LabelledImages` and the annotated ones of a task have them."""

    @property
    def split(self) -> str:
        """Its name."""

    @property
    def source(self) -> ImageSource:
        """The images."""

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of any image, their order and what is said of them."""


def evaluation_record(
    task: str,
    model: dict[str, Any],
    data: dict[str, Any],
    settings: dict[str, Any],
    metrics: dict[str, float],
    *,
    details: dict[str, Any],
    pictures: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    """Return one entry of `evaluations`; the module's docstring says what is in it."""
    return {
        "task": task,
        "model": model,
        "data": data,
        "settings": settings,
        "metrics": metrics,
        "details": details,
        "pictures": list(pictures),
        "environment": _environment(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }


def describe_data(arguments: Any, train: Split, test: Split, overlap: int, **more: Any) -> dict[str, Any]:
    """Return the `data` of an entry; `more` is what a task says of it beside."""
    return {
        "dataset": public_name(arguments.dataset_name),
        "config": arguments.dataset_config_name,
        "train_split": train.split,
        "test_split": test.split,
        "image_column": arguments.image_column_name,
        **more,
        "num_train": len(train.source),
        "num_test": len(test.source),
        "train_fingerprint": train.fingerprint,
        "test_fingerprint": test.fingerprint,
        "test_images_in_train": overlap,
    }


def describe_labels(arguments: LabelledDataArguments, train: LabelledImages, test: LabelledImages) -> dict[str, Any]:
    """Return what the `data` of an entry says of the labels; of a file's, what tells them from those of another."""
    told: dict[str, Any] = {
        "label_column": arguments.label_column_name,
        "num_classes": len(set(train.labels)),
        "class_names": train.class_names,
    }
    if arguments.labels_file is None:
        return told
    rows = [
        (images.source.describe(index), images.class_names[label], images.split)
        for images in (train, test)
        for index, label in enumerate(images.labels)
    ]
    told |= dict.fromkeys(("train_split", "test_split"), arguments.train_split)  # the file's splits are within it
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    return told | {"label_column": "labels_file", "labels_digest": digest}


def add_evaluation(folder: Path, record: dict[str, Any]) -> None:
    """Add an entry to a folder's `results.json`, in place of an earlier one of the same; the rest stays as it is.

    Raises:
        InputError: The file there is not ours to change.
    """
    results = read_results(folder)
    known = results.get(EVALUATIONS, [])
    kept = [one for one in known if any(one.get(key) != record[key] for key in SAME)]
    results[EVALUATIONS] = [*kept, record]
    write_results(folder, results)


def split_by_weights(folder: Path, results: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return results with those evaluations alone that are of a folder's model, and the evaluations of others.

    A folder may hold evaluations of other models, by `output_dir`, and of weights or a configuration that it had
    before. An entry that does not say which weights it is of counts as the model's.

    Args:
        folder: Of the model.
        results: What a `results.json` holds, checked.

    Raises:
        InputError: There are evaluations, and the model does not load.
    """
    known = results.get(EVALUATIONS) or []
    weights = [(one.get("model") or {}).get("weights") for one in known]
    if all(one is None for one in weights):
        return results, []
    own = _digests(folder)
    kept = [entry for entry, one in zip(known, weights, strict=True) if one is None or one in own]
    others = [entry for entry, one in zip(known, weights, strict=True) if not (one is None or one in own)]
    return results | {EVALUATIONS: kept}, others


def _digests(folder: Path) -> list[str]:
    """Return what evaluations of a folder's model call its weights: of the encoder, of a classifier as a whole too."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classifies = any(str(one).endswith("ForImageClassification") for one in config.get("architectures") or ())
    classes = [AutoModel, AutoModelForImageClassification] if classifies else [AutoModel]
    try:
        return [weights_digest(load_weights(one, str(folder))[0]) for one in classes]
    except (OSError, ValueError, StrictDataclassError) as error:
        raise no_model(str(folder), error, "RUN") from error


def results_folder(model: str, output_dir: str | None) -> Path:
    """Return the folder for results, which can be made; it is, with the first of them, so that an error leaves none.

    Raises:
        InputError: It cannot be made, or holds results that are not ours.
    """
    own = any((Path(model) / name).exists() for name in (FILE, "recipe.yaml"))
    folder = Path(output_dir or (model if own else f"{Path(model).resolve().name}-evaluation"))
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`output_dir`: expected a folder to write to, cannot make {folder}: {error}.") from error
    with contextlib.suppress(OSError):  # another evaluation has begun in one of them
        for one in new:
            one.rmdir()
    read_results(folder)
    return folder


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write a folder's results, whole, or what was there stays; the folder is made if there is none.

    Raises:
        OSError: No room, or a folder that is not writable.
    """
    path = folder / FILE
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_results(folder: Path) -> dict[str, Any]:
    """Return a folder's results, empty if it has none.

    Raises:
        InputError: A file of that name that holds something else.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"`output_dir`: expected JSON in {path}, got something else ({error}); move it away."
        ) from error
    if not isinstance(results, dict) or not isinstance(results.get(EVALUATIONS, []), list):
        raise InputError(f"`output_dir`: expected the results of a run in {path}, found something else; move it away.")
    try:
        return results | check_results(results)  # fields of a later version stay in the file
    except FileError as error:
        raise InputError(f"`output_dir`: {path}: {error}") from None


def _environment() -> dict[str, str]:
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        cores = torch.get_num_threads()
        hardware = f"{cores} CPU core{'s' * (cores != 1)} ({platform.machine()})"
    found = {"hardware": hardware, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
