"""BYOL: a view predicts what a slow copy of the model, its teacher, makes of the other view.

Source: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020 (arXiv 2006.07733), equations 1 and 2 and section 3.3
for the teacher's momentum.
"""

import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .encoder_outputs import encoder_outputs, pooled_features
from .global_batch import global_size, global_sum
from .objective import Objective, Terms, mean_over_pairs
from .vicreg_expander import VicRegExpander


def prediction_error(
    prediction: torch.Tensor, target: torch.Tensor, process_group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Return `mean (2 - 2 cos(prediction, target))` over the global batch; no gradient reaches the target.

    Args:
        prediction: `(batch, dimensions)`, the predictor's output for one view, this process's share.
        target: The same of the teacher's embeddings of another view.
        process_group: Processes that hold the batch in equal shares.
    """
    prediction, target = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (prediction, target))
    cosines = (F.normalize(prediction, dim=1) * F.normalize(target.detach(), dim=1)).sum(1)
    return global_sum((2 - 2 * cosines).sum(), process_group) / global_size(prediction, process_group)


def teacher_momentum(base: float, step: int, num_steps: int) -> float:
    """Return the share of itself that the teacher keeps after a step: from `base` to 1 along a cosine."""
    return 1 - (1 - base) * (math.cos(math.pi * step / num_steps) + 1) / 2


class BYOL(Objective):
    """The error of either global view's prediction, summed; local views predict both global ones.

    The teacher is a copy of encoder and expander, made at the first step. Its expander normalises over the batch, as
    the authors' does, its encoder drops no paths. Its weights lie in checkpoints and in `pretraining/`.
    """

    name = "byol"
    defaults = {"momentum": 0.996}  # noqa: RUF012  a constant
    further_per_image = 2

    def __init__(self, config, encoder, expander):
        super().__init__(config, encoder, expander)
        sizes = config.expander_sizes
        self.predictor = VicRegExpander(sizes[-1], [sizes[0], sizes[-1]], config.expander_norm)
        self.teacher = nn.ModuleDict({"encoder": copy.deepcopy(encoder), "expander": copy.deepcopy(expander)})
        self.teacher.requires_grad_(False)
        self.momentum = float(self.settings["momentum"])

    @classmethod
    def check(cls, settings, config):
        if not 0 <= settings["momentum"] <= 1:
            raise ValueError(f"`momentum`: expected a number from 0 to 1, got {settings['momentum']}.")
        if config.second_encoder is not None:
            raise ValueError("`second_encoder`: expected none with byol, whose predictor and teacher are of one.")

    @property
    def teachers(self):
        return [self.teacher["encoder"]]

    @torch.no_grad()
    def begin_step(self, model, step, num_steps):
        self.momentum = teacher_momentum(self.settings["momentum"], step, num_steps)
        if step == 0:  # the encoder may have got pretrained weights since it was built
            self.teacher["encoder"].load_state_dict(model.encoder.state_dict())
            self.teacher["expander"].load_state_dict(model.expander.state_dict())

    @torch.no_grad()
    def end_step(self, model):
        weights = [one for part in (model.encoder, model.expander) for one in part.parameters()]
        torch._foreach_lerp_(list(self.teacher.parameters()), weights, 1 - self.momentum)

    @torch.no_grad()
    def further(self, views):
        encoder = self.teacher["encoder"]
        # one that normalises over its batch does so, as the student's; any other one drops no paths
        norms = [one for one in encoder.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
        encoder.train(self.training and bool(norms))
        return [pooled_features(encoder_outputs(encoder, one.inputs)) for one in views[:2]]

    def forward(self, embeddings, further, process_group):
        teacher = self.teacher["expander"].train(self.training)  # an engine puts what does not learn into evaluation
        with torch.no_grad():
            targets = [teacher(one, process_group) for one in further]
        predictions = [self.predictor(one, process_group) for one in embeddings]

        # each global view predicts the other, each local view both
        def error_of(one: int, other: int) -> list[torch.Tensor]:
            pairs = [(other, one), (one, other)] if other < 2 else [(other, one)]
            errors = [prediction_error(predictions[seen], targets[hidden], process_group) for seen, hidden in pairs]
            return [torch.stack(errors).mean()]

        (error,) = mean_over_pairs(len(embeddings), error_of)
        return Terms(2 * error, {"prediction_error": error})


__all__ = ["BYOL", "prediction_error", "teacher_momentum"]
