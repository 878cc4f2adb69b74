"""What was measured, as tables of a card: every figure beside the command that gave it."""

import shlex
import statistics
from collections.abc import Iterator
from typing import Any

from huggingface_hub import EvalResult

from hf_vicreg.model_cards.escaping import code, prose

MISSING = "not measured"
COMMANDS = {
    "knn": "evaluate knn",
    "linear": "evaluate linear",
    "retrieval": "evaluate retrieval",
    "few_labels": "evaluate few-labels",
    "image_text": "evaluate image-text",
    "dense": "evaluate dense",
    "finetune_classification": "finetune classification",
    "finetune_detection": "finetune detection",
    "finetune_segmentation": "finetune segmentation",
    "finetune_captioning": "finetune captioning",
    "finetune_multitask": "finetune multitask",
}
WAYS = (("knn", "k-NN"), ("linear", "linear"))  # of reading a class off a patch's features
MASK_METRICS = (("mean_iou", "mIoU"), ("dice", "Dice"))
METADATA_TASKS = ("knn", "linear", "finetune_classification")  # of which accuracies go into the card's metadata
OWN_KNN = "k-NN classification of frozen features"
OWN_TASKS = (OWN_KNN, *(COMMANDS[one] for one in METADATA_TASKS))  # what the metadata call them


def figure(measured: dict[str, Any], key: str, form: str, unit: str = "") -> str:
    """Return a figure as it is written, "not measured" if it is not there."""
    value = measured.get(key)
    return MISSING if value is None else format(value, form) + unit


def count(measured: dict[str, Any], key: str) -> str:
    """Return a whole number as it is written, "not measured" if it is not there."""
    return figure(measured, key, ",d")


def in_flops(number: float) -> str:
    """Return a number of FLOPs by three digits: `134 GFLOP`."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.3g} {prefix}FLOP"
        number /= 1000
    return f"{number:,.4g} PFLOP"


def compute(flops: int, records: list[dict[str, Any]]) -> str:
    """Return what a step costs and what lines of a log say of the speed: medians, where they say anything."""
    found = [f"{in_flops(flops)} a step"]
    rates, shares = ([one[key] for one in records if key in one] for key in ("flops_per_second", "mfu"))
    if rates:
        found.append(f"{in_flops(statistics.median_low(rates))}/s")
    if shares:
        found.append(f"{statistics.median_low(shares):.0%} of the devices' peak")
    return ", ".join(found) + (" (medians of the log)" if rates else "")


def knn_table(
    results: dict[str, Any], dataset: str, *, second_encoder: bool, has_source: bool = False
) -> Iterator[str]:
    """Yield lines of the table of the run's own k-NN accuracies; some runs begin with a source's weights."""
    knn = results.get("knn_accuracy") or {}
    if not knn:
        if not results.get("evaluations"):  # else there is something to show
            yield f"k-NN accuracy on held-out images: {MISSING}."
        return
    before = "what it began with" if has_source else "untrained encoder"
    rows = [("raw pixels", "raw_pixels"), (before, "untrained"), ("**this encoder**", "trained")]
    if "raw_trained" in knn:
        rows.append(("its weights, not averaged", "raw_trained"))
    if second_encoder:
        rows += [("second encoder, untrained", "second_untrained"), ("**second encoder**", "second_trained")]
    yield f"| features | {results.get('knn_neighbours') or 'k'}-NN accuracy on held-out images |"
    yield "| --- | --- |"
    for words, key in rows:
        yield f"| {words} | {figure(knn, key, '.3f')} |"
    yield (
        f"\nk-NN by cosine similarity: {count(results, 'knn_test_samples')} held-out images of {code(dataset)} "
        f"against {count(results, 'knn_train_samples')} labelled ones, measured by the training command below."
    )


def dense_tables(results: dict[str, Any]) -> Iterator[str]:
    """Yield lines of a table for each evaluation by the tokens of patches; none if there were none."""
    rows = [("raw pixels", "pixels_"), ("untrained encoder", "untrained_"), ("**this encoder**", "")]
    metrics = [(f"{way}_{key}", f"{words}, {name}") for way, words in WAYS for key, name in MASK_METRICS]
    for one in results.get("evaluations") or []:
        if one.get("task") != "dense":
            continue
        data, found = one.get("data") or {}, one.get("metrics") or {}
        images = f"{count(data, 'num_test')} test images of {code(data.get('dataset') or MISSING)}"
        yield f"\n| patch features | {' | '.join(words for _, words in metrics)} |"
        yield f"| --- |{' --- |' * len(metrics)}"
        for words, prefix in rows:
            yield f"| {words} | {' | '.join(figure(found, prefix + key, '.3f') for key, _ in metrics)} |"
        yield (
            f"\nMasks of {images} by the features of patches alone, "
            f"learned from {count(data, 'num_train')} images with masks{overlap_note(data)}: {code(_command(one))}"
        )


def evaluations_table(results: dict[str, Any]) -> Iterator[str]:
    """Yield lines of the table of other evaluations that were made afterwards; none if there were none."""
    evaluations = [one for one in results.get("evaluations") or [] if one.get("task") != "dense"]
    if evaluations:
        yield "\n| evaluation | data | figures | command |"
        yield "| --- | --- | --- | --- |"
    for one in evaluations:
        data, metrics = one.get("data") or {}, one.get("metrics") or {}
        figures = ", ".join(f"{prose(name)} {value:.3f}" for name, value in metrics.items() if value is not None)
        images = f"{count(data, 'num_test')} images of {code(data.get('dataset') or MISSING)}"
        if data.get("num_train") is not None:
            images += f", {count(data, 'num_train')} training images"
        images += labels_note(data) + overlap_note(data)
        yield f"| {one.get('task') or MISSING} | {images} | {figures or MISSING} | {code(_command(one))} |"


def labels_note(data: dict[str, Any]) -> str:
    """Return a clause on labels that came from a file, empty where the data set has its own."""
    digest = data.get("labels_digest")
    return f", labels of a file (digest {digest})" if digest else ""


def overlap_note(data: dict[str, Any]) -> str:
    """Return a clause on test images that were trained on, empty where there are none."""
    overlap = data.get("test_images_in_train")
    return f", {overlap:,} of the test images are among the training images" if overlap else ""


def evaluation_results(results: dict[str, Any], dataset: str) -> list[EvalResult]:
    """Return what goes into the card's metadata: accuracies of the run's own k-NN and of later evaluations."""
    found = []
    accuracy = (results.get("knn_accuracy") or {}).get("trained")
    if accuracy is not None:
        name = f"{results.get('knn_neighbours') or 'k'}-NN accuracy, measured by the run"
        found.append(_entry(OWN_KNN, results.get("hub_dataset"), dataset, name, accuracy))
    for one in results.get("evaluations") or []:
        if labels_note(one.get("data") or {}):  # somebody's labels say nothing of the data set that is named
            continue
        for name, value in (one.get("metrics") or {}).items():
            if one.get("task") in METADATA_TASKS and name.startswith("accuracy") and value is not None:
                where = (one.get("data") or {}).get("dataset") or MISSING
                found.append(_entry(COMMANDS[one["task"]], None, where, metric_of(one["task"], name), value))
    return found


def metric_of(task: str, name: str) -> str:
    """Return what an accuracy is called in the metadata: the Hub puts those of all methods under one's name."""
    if task == "knn" and name.startswith("accuracy_k"):
        return f"{name.removeprefix('accuracy_k')}-NN accuracy"
    return f"linear probe {name}" if task == "linear" else name  # that of a classifier is the model's own


def _entry(task: str, dataset_id: str | None, dataset: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        task_name=task,
        dataset_type=dataset_id or dataset,
        dataset_name=dataset,
        metric_type="accuracy",
        metric_name=name,
        metric_value=round(value, 6),  # float32 means have digits that say nothing
    )


def _command(evaluation: dict[str, Any]) -> str:
    """Return the command of an evaluation, with the flags that change a figure."""
    task, data = str(evaluation.get("task")), evaluation.get("data") or {}
    flags = {"dataset_name": data.get("dataset"), "dataset_config_name": data.get("config")}
    flags |= {key: data.get(key) for key in ("train_split", "test_split")} | (evaluation.get("settings") or {})
    columns = {f"{key}_column_name": data.get(f"{key}_column") for key in ("image", "label", "mask")}
    flags |= {key: column for key, column in columns.items() if column is not None}
    flags |= {f"max_{key}_samples": data.get(f"num_{key}") for key in ("train", "test")}
    if data.get("labels_digest"):
        flags |= {"test_split": None, "label_column_name": None, "labels_file": "LABELS.csv"}
    if task == "finetune_multitask":  # which data is said in the file, for each task
        flags = evaluation.get("settings") or {}
    words = ["hf-vicreg", *COMMANDS.get(task, task).split(), "TASKS.yaml" if task == "finetune_multitask" else "MODEL"]
    for key, value in flags.items():
        if isinstance(value, str | int | float | list) and value != []:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
