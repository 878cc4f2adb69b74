"""`hf-vicreg evaluate knn`, `linear` and `retrieval`: load, extract, measure, show, store."""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.model_cards.results import labels_note
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import (
    EvaluationArguments,
    KnnArguments,
    LabelledDataArguments,
    LinearArguments,
    RetrievalArguments,
    check_ranges,
)
from hf_vicreg.training.evaluation.encoder import VisionEncoder, load_vision_encoder, source_for
from hf_vicreg.training.evaluation.features import Features, load_features, read_embeddings
from hf_vicreg.training.evaluation.labelled import LabelledImages, count_overlap, load_labelled
from hf_vicreg.training.evaluation.linear import linear_probe, require_sklearn
from hf_vicreg.training.evaluation.neighbours import knn_predictions, mean_average_precision, nearest_in_bank
from hf_vicreg.training.evaluation.pictures import can_draw, confusion_matrix, draw_confusion, draw_neighbours
from hf_vicreg.training.evaluation.results import (
    FILE,
    add_evaluation,
    describe_data,
    describe_labels,
    evaluation_record,
    results_folder,
)
from hf_vicreg.training.images.channels.raster import as_picture

PICTURED_QUERIES, PICTURED_NEIGHBOURS = 8, 8
MAX_STORED_CLASSES = 100  # of a confusion matrix, whose size is their square
SHOWN_K = 20  # whose confusions are shown
# flags that change no figure; where things lie on this machine is not stored
WATCHING = {
    "output_dir",
    "cache_dir",
    "embeddings",  # checked to be of this model and these images
    "unlabelled_dir",  # told by its name, and by its images' fingerprint to a resumed run
    "dataloader_num_workers",
    "logging_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
}


@dataclass
class Evaluation:
    """An evaluation under way: what all of them need, gathered once.

    Attributes:
        arguments: Its flags.
        folder: Where results and pictures go.
        encoder: The model.
        train: Labelled images.
        test: Images to test on.
        overlap: How many test images are byte for byte among the training images.
        started: When it began, `time.perf_counter` seconds.
        pictures: Files written so far.
    """

    arguments: EvaluationArguments
    folder: Path
    encoder: VisionEncoder
    train: LabelledImages
    test: LabelledImages
    overlap: int
    started: float
    pictures: list[str] = field(default_factory=list)

    def features(self) -> tuple[Features, Features]:
        """Return the features of both splits, each from its folder of embeddings if there is one.

        Raises:
            InputError: Embeddings of another model or other images.
        """
        arguments, folders = self.arguments, [Path(one) for one in self.arguments.embeddings or []]
        splits = zip_longest((self.train, self.test), folders)
        found = [read_embeddings(folder, images, self.encoder) if folder else None for images, folder in splits]
        train, test = (
            load_features(images, self.encoder, arguments.cache_dir, arguments.per_device_eval_batch_size)
            if one is None
            else one
            for images, one in zip((self.train, self.test), found, strict=True)
        )
        return train, test

    def picture(self, name: str) -> Path:
        """Return where to draw a picture, and note it."""
        self.pictures.append(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def store(self, task: str, metrics: dict[str, float], details: dict[str, Any]) -> dict[str, Any]:
        """Write and return the entry for `results.json`."""
        record = evaluation_record(
            task,
            self.encoder.describe(),
            describe_data(
                self.arguments,
                self.train,
                self.test,
                self.overlap,
                **describe_labels(self.arguments, self.train, self.test),
            ),
            settings_of(self.arguments),
            metrics,
            details=details,
            pictures=self.pictures,
            seconds=time.perf_counter() - self.started,
        )
        add_evaluation(self.folder, record)
        return record


def start_evaluation(model: str, arguments: EvaluationArguments) -> Evaluation:
    """Load and check everything before the first long computation.

    Raises:
        InputError: Bad flags, data, model or folder.
    """
    started = time.perf_counter()
    check_ranges(arguments)
    folder = results_folder(model, arguments.output_dir)
    train, test = load_labelled(arguments)
    encoder = load_vision_encoder(model)
    train, test = (dataclasses.replace(one, source=source_for(encoder.processor, one.source)) for one in (train, test))
    return Evaluation(arguments, folder, encoder, train, test, count_overlap(train.digests, test.digests), started)


def settings_of(arguments: LabelledDataArguments) -> dict[str, Any]:
    """Return the flags that change a figure and are not said among the data."""
    data = {one.name for one in dataclasses.fields(LabelledDataArguments)}
    return {key: value for key, value in vars(arguments).items() if key not in data | WATCHING}


def evaluate_knn(model: str, arguments: KnnArguments) -> dict[str, Any]:
    """Measure k-NN accuracies, print and store them; returns the entry of `results.json`.

    Args:
        model: Folder or Hub id.
        arguments: The flags.

    Raises:
        InputError: Bad input.
    """
    evaluation = start_evaluation(model, arguments)
    train, test = evaluation.features()
    neighbours = sorted({k for k in arguments.neighbours if k <= len(train)})
    if not neighbours:
        raise InputError(
            f"`neighbours`: expected a k of at most the {len(train)} training images, got {arguments.neighbours}."
        )
    predictions = knn_predictions(
        train.values, train.labels, test.values, neighbours=neighbours, temperature=arguments.temperature
    )
    metrics = {f"accuracy_k{k}": share_right(found, test.labels) for k, found in predictions.items()}
    shown = SHOWN_K if SHOWN_K in predictions else neighbours[-1]
    details = _confusions(evaluation, f"{shown}-NN", "knn", test.labels, predictions[shown])
    _neighbours(evaluation, train, test)
    record = evaluation.store("knn", metrics, details | {"neighbours_of_confusion": shown})
    rows = [[f"{k}-NN", _percent(metrics[f"accuracy_k{k}"], len(test))] for k in neighbours]
    print_table(["", "accuracy"], rows, evaluation)
    return record


def evaluate_linear(model: str, arguments: LinearArguments) -> dict[str, Any]:
    """Measure the linear probe, print and store it; as `evaluate_knn`."""
    require_sklearn()
    evaluation = start_evaluation(model, arguments)
    train, test = evaluation.features()
    probe = linear_probe(
        train.values, train.labels, test.values, held_out_ratio=arguments.held_out_ratio, seed=arguments.seed
    )
    accuracy = share_right(probe.predictions, test.labels)
    metrics = {"accuracy": accuracy, "mean_class_accuracy": _class_mean(probe.predictions, test.labels)}
    details = _confusions(evaluation, "linear probe", "linear", test.labels, probe.predictions) | {
        "C": probe.strength,
        "held_out_accuracy": {f"{strength:g}": value for strength, value in probe.held_out.items()},
        "converged": probe.converged,
    }
    record = evaluation.store("linear", metrics, details)
    rows = [
        ["accuracy", _percent(accuracy, len(test))],
        ["mean of the classes", f"{metrics['mean_class_accuracy']:.3f}"],
        ["C, of held-out images", f"{probe.strength:g}"],
    ]
    print_table(["linear probe", ""], rows, evaluation)
    return record


def evaluate_retrieval(model: str, arguments: RetrievalArguments) -> dict[str, Any]:
    """Measure how test images rank the training images, print and store it; as `evaluate_knn`."""
    evaluation = start_evaluation(model, arguments)
    train, test = evaluation.features()
    precision, counted = mean_average_precision(train.values, train.labels, test.values, test.labels)
    if not counted:
        raise InputError(
            "`test_split`: expected test images of classes that training images have, found none; name other splits "
            "or use more images."
        )
    (best,) = knn_predictions(train.values, train.labels, test.values, neighbours=[1]).values()
    metrics = {"mean_average_precision": precision, "first_is_right": share_right(best, test.labels)}
    _neighbours(evaluation, train, test)
    record = evaluation.store("retrieval", metrics, {"queries": counted})
    rows = [
        ["mean average precision", f"{precision:.3f}"],
        ["first is right", _percent(metrics["first_is_right"], len(test))],
    ]
    print_table(["retrieval", ""], rows, evaluation)
    return record


def share_right(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the accuracy, from 0 to 1."""
    return float((predictions == labels).double().mean())


def print_table(head: list[str], rows: list[list[str]], evaluation: Evaluation) -> None:
    """Print what was measured and where the rest is."""
    train, test = evaluation.train, evaluation.test
    data = f"{test.source.name}: {len(test.source)} test, {len(train.source)} training images"
    data += f", {len(set(train.labels))} classes{labels_note(describe_labels(evaluation.arguments, train, test))}"
    print(f"\n{one_line(evaluation.encoder.name)} on {one_line(data)}\n")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())
    print("\n" + "\n".join(str(evaluation.folder / name) for name in [FILE, *evaluation.pictures]))


def _percent(accuracy: float, count: int) -> str:
    """An accuracy with its standard error."""
    return f"{accuracy:.3f} ± {math.sqrt(accuracy * (1 - accuracy) / max(1, count)):.3f}"


def _class_mean(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    shares = [share_right(predictions[labels == one], labels[labels == one]) for one in labels.unique()]
    return sum(shares) / len(shares)


def _confusions(
    evaluation: Evaluation, what: str, name: str, labels: torch.Tensor, predictions: torch.Tensor
) -> dict[str, Any]:
    """Draw the confusion matrix and return what of it is stored; of too many classes there is none."""
    names = evaluation.train.class_names
    if len(names) > MAX_STORED_CLASSES:
        return {}
    counts = confusion_matrix(labels, predictions, len(names))
    if can_draw():
        title = f"{evaluation.encoder.name}, {what}: {share_right(predictions, labels):.3f}"
        draw_confusion(evaluation.picture(f"{name}_confusion.png"), counts, names, title)
    return {"confusion": counts.tolist()}


def _neighbours(evaluation: Evaluation, train: Features, test: Features) -> None:
    """Draw test images, one a class as long as there are any left, and the training images nearest to them."""
    if not can_draw():
        return
    firsts = {int(label): place for place, label in reversed(list(enumerate(test.labels)))}
    pictured = min(PICTURED_QUERIES, len(firsts))
    classes = [sorted(firsts)[place * len(firsts) // pictured] for place in range(pictured)]
    places = torch.tensor([firsts[one] for one in classes])
    parts = nearest_in_bank(train.values, test.values[places], min(PICTURED_NEIGHBOURS, len(train)))
    cosines, nearest = (torch.cat(part) for part in zip(*parts, strict=True))
    names = evaluation.train.class_names
    rows = []
    for query, row_cosines, row in zip(places, cosines, nearest, strict=True):
        image = evaluation.test.source.read(int(test.indices[query]))
        neighbours = []
        for place, cosine in zip(row, row_cosines, strict=True):
            found = evaluation.train.source.read(int(train.indices[place]))
            label = int(train.labels[place])
            if found is not None:
                neighbours.append((as_picture(found), names[label], float(cosine), label == int(test.labels[query])))
        if image is not None:
            rows.append((as_picture(image), names[int(test.labels[query])], neighbours))
    title = f"{evaluation.encoder.name}: nearest training images by cosine"
    draw_neighbours(evaluation.picture("neighbours.png"), rows, title)
