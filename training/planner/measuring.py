"""How long a run measures beside its steps: k-NN, linear probe and retrieval, by what a trial took for an image."""

import time

import torch

from hf_vicreg.modeling.modeling_vicreg import representation_size
from hf_vicreg.training.evaluation.online_probe import MAX_ITERATIONS, PIXELS_SIDE, linear_accuracy
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.planner.choices import Images
from hf_vicreg.training.planner.machine import Machine
from hf_vicreg.training.planner.trial import Trial
from hf_vicreg.training.run.config import RunConfig

TRIED_ITERATIONS = 3


def measuring_seconds(
    config: RunConfig, images: Images, held_out: ImageSource | None, machine: Machine, trial: Trial
) -> tuple[float, float]:
    """Return the seconds of what is measured before the first step, and of each measurement after it.

    Args:
        config: The run's.
        images: To train on; the bank of the k-NN is of them.
        held_out: To measure on, if there are any.
        machine: What each process may use.
        trial: What it took for an image.
    """
    run, before, each = config.run, 0.0, 0.0
    if held_out is None:
        return before, each
    queries = min(run.knn_test_samples, len(held_out))
    if images.labelled and held_out.labels is not None:
        bank = min(run.knn_train_samples, images.count)
        share = -(-(bank + queries) // machine.num_processes)
        pixels, encoder = share * trial.read_seconds, share * (trial.read_seconds + trial.encode_seconds)
        if run.linear_probe:
            classes = max(1, *held_out.labels) + 1
            pixels += linear_seconds(bank, config.num_channels * PIXELS_SIDE**2, classes)
            encoder += linear_seconds(bank, representation_size(config.vicreg.encoder), classes)
        before, each = pixels + encoder, encoder * (2 if run.ema_decay else 1)  # averages, and the weights themselves
    if held_out.captions is not None:
        each += queries * trial.retrieval_seconds
    return before, each


def linear_seconds(images: int, features: int, classes: int) -> float:
    """Return the seconds of a linear probe that takes all its iterations, after a few on numbers that are drawn."""
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randn(images, features, generator=drawn)
    labels = torch.randint(classes, (images,), generator=drawn)
    began = time.perf_counter()
    linear_accuracy(rows, labels, rows[:1], labels[:1], iterations=TRIED_ITERATIONS)
    return (time.perf_counter() - began) * MAX_ITERATIONS / TRIED_ITERATIONS
