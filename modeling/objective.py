"""What a method of pretraining adds to an encoder and its expander: a loss over views, and what else that needs.

A method is a subclass of `Objective` in a module of its own, entered in `objectives.py`. See the guide "objectives".
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class Terms(NamedTuple):
    """A loss and the parts that are logged beside it, scalar tensors."""

    loss: torch.Tensor
    parts: dict[str, torch.Tensor]


class View(NamedTuple):
    """One view of this process's images, on its way from the encoder to the loss.

    Attributes:
        inputs: What the encoder took: `pixel_values` `(batch, channels, height, width)`.
        tokens: `(batch, rows, columns, features)`, those of the patches, of methods with `needs_tokens`.
        geometry: `(batch, 6)`, likewise: row by row the 2 x 3 matrix from a place (x, y, 1) in the view, in shares of
            its width and height, to the place in the image.
        pooled: `(batch, features)`, the encoder's pooled output.
    """

    inputs: dict[str, torch.Tensor]
    tokens: torch.Tensor | None = None
    geometry: torch.Tensor | None = None
    pooled: torch.Tensor | None = None


class Objective(nn.Module):
    """One method; parameters of its own, where it has any, are trained with the encoder and stored in `pretraining/`.

    Attributes:
        name: As `objective` and its section of the settings have it.
        defaults: The settings there are, with their defaults; lists are of whole numbers.
        needs_tokens: Whether `further` is given the patch tokens of each view and where they lie.
        sees_shifts: Whether one vector added to all embeddings changes the loss.
        encodes: Whether the method takes the views through the encoder itself: `encode` in place of `further`.
        uses_expander: Whether the loss sees embeddings; without, there is no expander, and these are pooled features.
        further_per_view: How many tensors `further` returns for each view.
        further_per_image: How many it returns beside those.
        shares_are_equal: Whether the caller sees to it that every process has as many samples: then nothing is asked.
        settings: Those of this one, complete.
    """

    name: str
    defaults: ClassVar[dict[str, Any]] = {}
    needs_tokens: bool = False
    sees_shifts: bool = True
    encodes: bool = False
    uses_expander: ClassVar[bool] = True
    further_per_view: int = 0
    further_per_image: int = 0
    shares_are_equal: bool = False

    def __init__(self, config: Any, encoder: nn.Module, expander: nn.Module):
        """Make what the method needs beside the model's encoder and expander.

        Args:
            config: The model's `VicRegConfig`.
            encoder: Of the model; not to be stored, which would store its weights twice.
            expander: The same.
        """
        super().__init__()
        self.settings: dict[str, Any] = self.defaults | dict(config.objective_settings or {})

    @classmethod
    def check(cls, settings: dict[str, Any], config: Any) -> None:
        """Raise ValueError for complete settings, of the right types, that make no such loss."""

    @classmethod
    def check_views(cls, settings: dict[str, Any], config: Any, image_size: tuple[int, int]) -> None:
        """Raise ValueError where views of so many pixels, (height, width), cannot be learned from so."""

    def encode(
        self, encoder: nn.Module, inputs: Sequence[dict[str, torch.Tensor]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return pooled features `(batch, features)` of each view, and what `further` would; where it `encodes`."""
        raise NotImplementedError

    def further(self, views: Sequence[View]) -> list[torch.Tensor]:
        """Return what the loss needs beside the pooled features of the views, tensors with the batch first.

        Called with the encoder, on some of the images; `forward` gets the tensors of all of them.
        """
        return []

    def forward(
        self,
        embeddings: Sequence[torch.Tensor],
        further: Sequence[torch.Tensor],
        process_group: dist.ProcessGroup | None,
    ) -> Terms:
        """Return the loss of the global batch.

        Args:
            embeddings: `(batch, dimensions)` of each view, this process's share; the two global views come first.
            further: Of the method of that name, over the whole batch.
            process_group: Processes that hold the batch in equal shares; see `global_batch.py`. All call.
        """
        raise NotImplementedError

    @property
    def teachers(self) -> list[nn.Module]:
        """Encoders of its own, which do not learn by gradients."""
        return []

    def begin_step(self, model: nn.Module, step: int, num_steps: int) -> None:
        """Take note of a step that is about to begin, of so many; all that depends on it follows from it alone."""

    def end_step(self, model: nn.Module) -> None:
        """Follow the model's weights, which a step has just changed."""


def view_pairs(num_views: int) -> Iterator[tuple[int, int, float]]:
    """Yield each two views that shall agree, one of the first two and any other, and their share of the mean."""
    for one in range(2):
        for other in range(one + 1, num_views):
            # the two global views are a pair from either side
            yield one, other, (2 if other < 2 else 1) / (2 * (num_views - 1))


def mean_over_pairs(num_views: int, terms_of: Callable[[int, int], Sequence[torch.Tensor]]) -> torch.Tensor:
    """Return the mean over `view_pairs` of a pair's terms `(terms,)`.

    Args:
        num_views: Views there are.
        terms_of: Of two views by their numbers: scalars.
    """
    return torch.stack([share * torch.stack([*terms_of(*pair)]) for *pair, share in view_pairs(num_views)]).sum(0)


def require(settings: dict[str, Any], name: str, *, above: float | None = None, least: float | None = None) -> None:
    """Raise ValueError for a number that is not above, or not at least, another."""
    value = settings[name]
    if above is not None and not value > above:
        raise ValueError(f"`{name}`: expected a number above {above:g}, got {value}.")
    if least is not None and not value >= least:
        raise ValueError(f"`{name}`: expected at least {least:g}, got {value}.")


__all__ = ["Objective", "Terms", "View", "mean_over_pairs", "require", "view_pairs"]
