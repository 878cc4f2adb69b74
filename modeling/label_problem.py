"""What kind of loss a classifier's labels ask for, and whether they fit."""

from typing import NamedTuple

import torch

from .configuration_bigbird_vit import BigBirdViTConfig

CLASSES = "single_label_classification"


class LabelProblem(NamedTuple):
    """What transformers' loss reads of a configuration."""

    num_labels: int
    problem_type: str


def label_problem(labels: torch.Tensor, pixel_values: torch.Tensor | None, config: BigBirdViTConfig) -> LabelProblem:
    """Return what kind of loss the labels ask for, and check that they fit.

    transformers' loss would write the kind it infers into the configuration, and torch.compile compile again. Only
    several labels an image are written, since pipelines read it, and not by a compiled model. Neither does that
    compare labels with their number: a compiler cannot look at values.
    """
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"`labels`: expected a tensor, got {type(labels).__name__}.")
    given, batch = config.problem_type, len(labels) if pixel_values is None else len(pixel_values)
    integers = CLASSES if not labels.is_floating_point() else "multi_label_classification"
    kind = given or ("regression" if config.num_labels == 1 else integers)
    wide = kind == "multi_label_classification" or (kind == "regression" and config.num_labels > 1)
    shapes = [(batch, config.num_labels)] if wide else [(batch,), (batch, 1)]
    if tuple(labels.shape) not in shapes or (kind == CLASSES and labels.is_floating_point()):
        wanted = "integers (batch,)" if kind == CLASSES else f"numbers {shapes[0]}"
        raise ValueError(
            f"`labels`: expected {wanted} for problem type {kind!r}, got {labels.dtype} {tuple(labels.shape)} for "
            f"{batch} images; integers (batch,) are classes, floats (batch, num_labels) several labels an image."
        )
    if torch.compiler.is_compiling():
        return LabelProblem(config.num_labels, kind)
    if kind == CLASSES:
        wrong = labels[((labels < 0) & (labels != -100)) | (labels >= config.num_labels)]
        if len(wrong):
            raise ValueError(
                f"`labels`: expected 0 to {config.num_labels - 1} (`num_labels` is {config.num_labels}), or -100 for "
                f"no label, got {wrong[0].item()}."
            )
    elif wide:
        config.problem_type = kind
    return LabelProblem(config.num_labels, kind)


__all__ = ["CLASSES", "LabelProblem", "label_problem"]
