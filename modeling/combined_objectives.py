"""Several methods at once: the weighted sum of their losses, over one encoding of the views.

Where one of them masks images, the others see the pooled features of what it leaves visible, and nothing is encoded
twice. Source of that form: Mishra et al. 2022, "A simple, efficient and scalable contrastive masked autoencoder for
learning visual representations" (arXiv 2210.16870), section 3: SimCLR and MAE on two masked views.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from .objective import Objective, Terms, View


class Combined(Objective):
    """`sum_i weight_i loss_i`; parts are logged as `NAME_loss` and `NAME_PART`.

    Attributes:
        parts: The methods by name, each with its own settings.
        weights: Of their losses.
    """

    def __init__(self, name: str, parts: Mapping[str, Objective], settings: dict[str, Any]):
        """Join methods that `refuse_combination` lets pass.

        Args:
            name: Of all of them, as `objective` has it.
            parts: By name.
            settings: Complete: `weights`, and those of each method under its name.
        """
        nn.Module.__init__(self)
        self.name, self.settings = name, settings
        self.parts, self.weights = nn.ModuleDict(parts), settings["weights"]
        self.needs_tokens = any(one.needs_tokens for one in parts.values())
        self.sees_shifts = any(one.sees_shifts for one in parts.values() if one.uses_expander)
        self.encodes = any(one.encodes for one in parts.values())
        self.further_per_view = sum(one.further_per_view for one in parts.values())
        self.further_per_image = sum(one.further_per_image for one in parts.values())

    @property
    def each(self) -> dict[str, Objective]:
        """The methods by name."""
        return cast("dict[str, Objective]", dict(self.parts.items()))

    @property
    def teachers(self):
        return [teacher for one in self.each.values() for teacher in one.teachers]

    def begin_step(self, model, step, num_steps):
        for one in self.each.values():
            one.begin_step(model, step, num_steps)

    def end_step(self, model):
        for one in self.each.values():
            one.end_step(model)

    def encode(self, encoder, inputs):
        (masked,) = (one for one in self.each.values() if one.encodes)
        pooled, own = masked.encode(encoder, inputs)
        views = [View(one, pooled=feature) for one, feature in zip(inputs, pooled, strict=True)]
        return pooled, self._joined(own if one is masked else one.further(views) for one in self.each.values())

    def further(self, views):
        return self._joined(one.further(views) for one in self.each.values())

    def forward(self, embeddings, further, process_group):
        losses, parts, at = [], {}, 0
        for name, one in self.each.items():
            one.shares_are_equal = self.shares_are_equal
            end = at + len(embeddings) * one.further_per_view + one.further_per_image
            terms = one(embeddings, further[at:end], process_group)
            losses.append(self.weights[name] * terms.loss)
            at = end
            parts[f"{name}_loss"] = terms.loss
            parts |= {f"{name}_{part}": value for part, value in terms.parts.items()}
        return Terms(torch.stack(losses).sum(), parts)

    @staticmethod
    def _joined(found: Any) -> list[torch.Tensor]:
        return [tensor for of_one in found for tensor in of_one]


def refuse_combination(kinds: Sequence[type[Objective]], config: Any) -> None:
    """Raise ValueError for methods that cannot share one encoding, or a `VicRegConfig` with a loss of pairs.

    Any that see pooled features go together. One that masks images goes with them as well, as they can do with what it
    leaves visible; not with another one, whose masks are its own, nor with one that needs every patch of a view.
    """
    names = [kind.name for kind in kinds]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`objective`: expected each method once, got {twice!r} {names.count(twice)} times.")
    masked = [kind.name for kind in kinds if kind.encodes]
    if len(masked) > 1:
        raise ValueError(
            f"`objective`: expected one method that masks images at most, got {' and '.join(masked)}; leave one out."
        )
    whole = [kind.name for kind in kinds if kind.needs_tokens]
    if masked and whole:
        raise ValueError(
            f"`objective`: expected no method beside {masked[0]} that needs every patch of a view, as it masks some, "
            f"got {whole[0]}; leave one out."
        )
    if config.pair_loss != "vicreg":
        raise ValueError(f"`pair_loss`: expected 'vicreg' with several objectives, got {config.pair_loss!r}.")


__all__ = ["Combined", "refuse_combination"]
