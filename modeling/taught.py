"""Learning from a teacher: beside its own loss, an encoder predicts the features of a frozen one.

A linear map of the student's pooled feature of a view predicts the teacher's of the same view, standardised over the
batch: what all images have in common says nothing. Another one of each patch's token predicts the teacher's token
there, whitened by a layer norm without weights. Source: Wei et al. 2022, "Contrastive Learning Rivals Masked Image
Modeling in Fine-tuning via Feature Distillation" (arXiv 2205.14141), section 3, for the whitened tokens; Ranzinger et
al. 2024, PHI-S (arXiv 2410.01680), for standardising a teacher's features by dimension.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .encoder_outputs import encoder_outputs, patch_grid, pooled_features
from .global_batch import global_size, global_sum
from .global_batch_norm import standardised
from .objective import Objective, Terms, View

EPS = 1e-5
Normalisation = tuple[Sequence[float], Sequence[float]]  # mean and deviation of each channel of pixels in [0, 1]


class WithTeacher(Objective):
    """An objective with the error of predicting a teacher's features added to its loss, times a weight.

    It takes the place of a model's own objective while that is trained; what `inner` is goes on with the model.
    """

    def __init__(self, inner: Objective, widths: tuple[int, int], *, weight: float):
        """Make the map of pooled features.

        Args:
            inner: The model's objective.
            widths: Of the student's features and of the teacher's.
            weight: Of the error.
        """
        nn.Module.__init__(self)
        self.inner, self.weight = inner, weight
        self.name, self.settings, self.sees_shifts = inner.name, inner.settings, True
        self.needs_tokens, self.further_per_view = inner.needs_tokens, inner.further_per_view
        self.pooled_map = nn.Linear(*widths)

    @property
    def teachers(self):
        """The encoders that the inner objective keeps beside the model's."""
        return getattr(self.inner, "teachers", [])

    def begin_step(self, model, step, num_steps):
        self.inner.begin_step(model, step, num_steps)

    def end_step(self, model):
        self.inner.end_step(model)


class TaughtByFeatures(WithTeacher):
    """The same, of features of the whole images that a teacher has left; `see` says which images a step has."""

    def __init__(self, inner: Objective, features: torch.Tensor, width: int, *, weight: float):
        """Keep the features, which are not stored.

        Args:
            inner: The model's objective.
            features: `(images, features)`, by index of the image.
            width: Of the student's features.
            weight: Of the error.
        """
        super().__init__(inner, (width, features.shape[1]), weight=weight)
        self.further_per_image = inner.further_per_image + 2  # of both global views the prediction
        self.stored = [features]  # in a list: no part of the model
        self.seen = torch.zeros(0, dtype=torch.int64)

    def see(self, indices: torch.Tensor) -> None:
        """Take note of the images of a step, this process's, in their order."""
        self.seen = indices

    def further(self, views: Sequence[View]) -> list[torch.Tensor]:
        """Return what the inner objective needs, then the predictions of the two global views."""
        return [*self.inner.further(views), *(self.pooled_map(view.pooled) for view in views[:2])]

    def forward(self, embeddings, further, process_group):
        *further, one, other = further
        loss, parts = self.inner(embeddings, further, process_group)
        target = self.stored[0][self.seen].to(one.device)
        error = (pooled_error(one, target, process_group) + pooled_error(other, target, process_group)) / 2
        return Terms(loss + self.weight * error, parts | {"teacher_error": error})


class Taught(WithTeacher):
    """The same, of a teacher that sees the views, tokens of patches included."""

    def __init__(
        self,
        inner: Objective,
        teacher: PreTrainedModel,
        widths: tuple[int, int],
        *,
        weight: float,
        normalisation: Normalisation,
        own_normalisation: Normalisation,
        with_tokens: bool,
        image_size: tuple[int, int] | None,
    ):
        """Freeze the teacher, which is not stored, and make the maps, which are.

        Args:
            inner: The model's objective.
            teacher: Any vision encoder.
            widths: Of the student's features and of the teacher's.
            weight: Of the error.
            normalisation: Of the teacher's pixels.
            own_normalisation: Of the student's.
            with_tokens: Whether both have a token for each patch.
            image_size: (height, width) in pixels of what the teacher sees; None: the views as they are.
        """
        super().__init__(inner, widths, weight=weight)
        self.needs_tokens = with_tokens or inner.needs_tokens
        # of both global views the prediction and what is predicted, and the errors of patches
        self.further_per_image = inner.further_per_image + 4 + with_tokens
        self.with_tokens, self.image_size = with_tokens, image_size
        self.token_map = nn.Linear(*widths) if with_tokens else None
        self.kept = [teacher.eval().requires_grad_(False)]  # in a list: no part of the model
        (mean, std), (own_mean, own_std) = (
            torch.tensor(one)[:, :, None, None] for one in (normalisation, own_normalisation)
        )
        self.scale, self.shift = own_std / std, (own_mean - mean) / std

    def further(self, views: Sequence[View]) -> list[torch.Tensor]:
        """Return what the inner objective needs, then predictions, targets and errors of the two global views."""
        predictions, targets, errors = [], [], []
        for view in views[:2]:
            pooled, tokens = self._taught(view.inputs["pixel_values"])
            predictions.append(self.pooled_map(view.pooled))
            targets.append(pooled)
            if self.token_map is not None and tokens is not None:
                errors.append(token_error(self.token_map(view.tokens), tokens))
        of_patches = [torch.stack(errors).mean(0)] if errors else []
        return [*self.inner.further(views), *predictions, *targets, *of_patches]

    def forward(self, embeddings, further, process_group):
        count = 4 + self.with_tokens
        further, own = further[: len(further) - count], further[len(further) - count :]
        loss, parts = self.inner(embeddings, further, process_group)
        error = sum(pooled_error(own[view], own[2 + view], process_group) for view in range(2)) / 2
        if self.with_tokens:
            error = error + global_sum(own[4].float().sum(), process_group) / global_size(own[4], process_group)
        return Terms(loss + self.weight * error, parts | {"teacher_error": error})

    @torch.no_grad()
    def _taught(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The teacher's pooled features and tokens of a view, at the size that it learned from."""
        (teacher,) = self.kept
        if teacher.device != pixel_values.device:
            teacher.to(pixel_values.device)
            self.scale, self.shift = self.scale.to(pixel_values.device), self.shift.to(pixel_values.device)
        pixels = pixel_values * self.scale + self.shift
        size = self.image_size
        if size is not None and size != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        outputs = encoder_outputs(teacher, {"pixel_values": pixels})
        tokens = None
        if self.with_tokens:
            tokens = patch_grid(outputs.last_hidden_state, teacher.config, *pixels.shape[-2:])
        return pooled_features(outputs), tokens


def pooled_error(
    prediction: torch.Tensor, target: torch.Tensor, process_group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Return the mean square of a prediction minus the standardised target, over the global batch.

    Args:
        prediction: `(batch, features)`, this process's share.
        target: The same, of the teacher; each feature is given mean 0 and variance 1 over the global batch.
        process_group: Processes that hold the batch in equal shares.
    """
    with torch.no_grad():
        target = standardised(target.float(), EPS, process_group)
    squares = (prediction.float() - target).square().mean(1)
    return global_sum(squares.sum(), process_group) / global_size(squares, process_group)


def token_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return for each image `(batch,)` the mean square of predicted minus whitened tokens.

    Args:
        prediction: `(batch, rows, columns, features)`.
        target: The same of the teacher, resampled to the rows and columns of the prediction.
    """
    target = target.float()
    rows, columns = prediction.shape[1:3]
    if target.shape[1:3] != prediction.shape[1:3]:
        maps = target.permute(0, 3, 1, 2)
        target = F.interpolate(maps, (rows, columns), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    target = F.layer_norm(target, target.shape[-1:])
    return (prediction.float() - target).square().mean((1, 2, 3))


__all__ = ["Taught", "TaughtByFeatures", "WithTeacher", "pooled_error", "token_error"]
