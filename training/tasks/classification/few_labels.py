"""`hf-vicreg evaluate few-labels`: what a model is worth when few images have labels, over several draws of them."""

import logging
import statistics
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from hf_vicreg.training.engine.checkpoint import RunState
from hf_vicreg.training.engine.loop import LoopSettings, TrainingLoop
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import FewLabelsArguments, TuningArguments
from hf_vicreg.training.evaluation.evaluate import Evaluation, print_table, share_right, start_evaluation
from hf_vicreg.training.evaluation.features import Features
from hf_vicreg.training.evaluation.linear import linear_probe, require_sklearn
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.tasks.classification.command import tuning_from
from hf_vicreg.training.tasks.classification.data import LABELLED, UNLABELLED
from hf_vicreg.training.tasks.classification.model import build_classifier, classifier_accelerator, refuse_wrapper
from hf_vicreg.training.tasks.classification.training import ClassifierStep

logger = logging.getLogger(__name__)

HELD_OUT_RATIO = 0.2


def evaluate_few_labels(model: str, arguments: FewLabelsArguments) -> dict[str, Any]:
    """Measure every method with every number of labels over several seeds; print and store means and spreads.

    A seed draws the labelled images, the same ones for every method, and the weights and order of a fine-tuning.

    Args:
        model: Folder or Hub id.
        arguments: The flags.

    Returns:
        The entry of `results.json`; `details["runs"]` lists every run.

    Raises:
        InputError: Bad input.
    """
    amounts = {amount_name(amount): amount for amount in map(parse_amount, arguments.labels)}
    if "linear" in arguments.methods:
        require_sklearn()
    tuned = [one for one in arguments.methods if one != "linear"]
    if tuned:
        refuse_wrapper(model)
    evaluation = start_evaluation(model, arguments)
    seeds = range(arguments.seed, arguments.seed + arguments.num_seeds)
    # all draws before the first long computation: too few images of a class show at once
    draws = {(text, seed): evaluation.train.draw(amount, seed) for text, amount in amounts.items() for seed in seeds}
    features = evaluation.features() if "linear" in arguments.methods else None
    accelerator = classifier_accelerator(model, arguments.mixed_precision) if tuned else None
    if tuned:
        count = len(tuned) * len(draws)
        logger.info("%d fine-tunings of up to %s steps; --methods linear does without", count, arguments.max_steps)
    runs: list[dict[str, Any]] = []
    for method in arguments.methods:
        for (text, seed), indices in draws.items():
            if method == "linear":
                assert features is not None
                accuracy = _linear(features, indices, seed)
            else:
                assert accelerator is not None
                accuracy = _tuned(model, method, evaluation, arguments, indices, seed, accelerator)
            logger.info("%s, %s labels (%d images), seed %d: %.3f", method, text, len(indices), seed, accuracy)
            runs.append(
                {"method": method, "labels": text, "num_labels": len(indices), "seed": seed, "accuracy": accuracy}
            )
    metrics: dict[str, float] = {}
    rows = []
    for text in amounts:
        for method in arguments.methods:
            some = [run for run in runs if run["method"] == method and run["labels"] == text]
            mean, spread = mean_and_spread([run["accuracy"] for run in some])
            metrics |= {f"{method}_{text}_mean": mean, f"{method}_{text}_std": spread}
            shown = f"{mean:.3f} ± {spread:.3f}" if len(some) > 1 else f"{mean:.3f}"
            rows.append([text, str(some[0]["num_labels"]), method, shown])
    record = evaluation.store("few_labels", metrics, {"runs": runs})
    print_table(["labels", "images", "method", f"accuracy, {arguments.num_seeds} seed(s)"], rows, evaluation)
    return record


def parse_amount(text: str) -> float | int:
    """Return a share of the images for `10%`, a number of images of each class for `10`.

    Raises:
        InputError: Neither.
    """
    try:
        amount = float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        amount = 0
    if not amount > 0 or (isinstance(amount, float) and amount > 1):
        raise InputError(f"`labels`: expected percentages up to 100% or numbers of at least 1 a class, got {text!r}.")
    return amount


def amount_name(amount: float | int) -> str:
    """Return what `parse_amount` reads as this amount, however it was written: `10%`, `10`."""
    return f"{100 * amount:.10g}%" if isinstance(amount, float) else str(amount)


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, 0 of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def tuning_of(method: str, arguments: FewLabelsArguments) -> TuningArguments:
    """Return how a method trains; an untrained encoder learns whole, however the pretrained one does."""
    settings = tuning_from(arguments)
    if method == "scratch":
        settings = replace(settings, layer_decay=1.0, lora_rank=0, freeze_encoder=False)
    return settings


def _linear(features: tuple[Features, Features], indices: list[int], seed: int) -> float:
    train, test = features
    chosen = torch.isin(train.indices, torch.tensor(indices))
    probe = linear_probe(
        train.values[chosen], train.labels[chosen], test.values, held_out_ratio=HELD_OUT_RATIO, seed=seed
    )
    return share_right(probe.predictions, test.labels)


def _tuned(
    name: str,
    method: str,
    evaluation: Evaluation,
    arguments: FewLabelsArguments,
    indices: list[int],
    seed: int,
    accelerator: Accelerator,
) -> float:
    train = evaluation.train
    settings = tuning_of(method, arguments)
    sources: dict[str, ImageSource] = {LABELLED: train.select(indices).source}
    if method == "consistency":
        sources[UNLABELLED] = replace(train.source, labels=None)
    classifier = build_classifier(name, train.class_names, from_scratch=method == "scratch", seed=seed)
    step = ClassifierStep(classifier, evaluation.encoder.processor, settings, sources, accelerator, seed=seed)
    set_seed(seed)
    TrainingLoop(step, LoopSettings.of(settings), accelerator, RunState(), folder=None).fit()
    accuracy = share_right(*step.predict(evaluation.test.source, arguments.per_device_eval_batch_size))
    accelerator.free_memory()  # it would keep every model it ever prepared
    return accuracy
