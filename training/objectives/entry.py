"""What a run says of an objective without computing it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class SectionFlag(NamedTuple):
    """A field of a configuration: its default, what is given for it, and what it is."""

    default: Any
    value: str
    text: str


def expander_for(batch: int) -> list[int]:
    """Return the widths of an expander for a batch of the loss: 8 times as wide, three layers."""
    return [min(8192, max(128, 8 * batch))] * 3


@dataclass(frozen=True)
class ObjectiveEntry:
    """One objective.

    Attributes:
        name: As `--objective` and its section have it; the same as of the class in `modeling/objectives.py`.
        title: As a card has it.
        parts: Names of the parts of its loss, in the order of the log.
        settings: Fields of its section, the defaults those of the class.
        remedies: What to do, by the name of what the doctor finds; these replace VICReg's.
        silent: Names of what the doctor finds that mean nothing here.
        unit_sphere: Whether the loss sees the directions of the embeddings alone. Their health is then measured after
            each is scaled to the length that unit standard deviations would give it.
        loss_falls: Whether a loss that rises is a sign of trouble. Not where an untrained encoder, whose views agree
            by themselves, may have a low one.
        loss_wavers: Whether the loss moves with what the images of a batch show, as the error of a reconstruction
            does: where some are blank, by a quarter from one batch to the next.
        vicreg_weights: Whether the weights of the section `vicreg` are of this loss. Its expander is everybody's.
        takes_places: Whether the model is to be told where in its image each view lies.
        whole_patches: Whether patches may not overlap.
        encodes: Whether the method takes the views through the encoder itself, other patches of them in each step.
        uses_expander: Whether the loss sees embeddings.
        one_encoder: Why two branches cannot be trained, where they cannot.
        tuned: Settings that are worth tuning, with the range to look in; None: a fifth to five times what they are.
        expander_sizes: Widths that a plan gives the expander, of the batch of the loss.
    """

    name: str
    title: str
    parts: tuple[str, ...]
    settings: Mapping[str, SectionFlag] = field(default_factory=dict)
    remedies: Mapping[str, str] = field(default_factory=dict)
    silent: frozenset[str] = frozenset()
    unit_sphere: bool = False
    loss_falls: bool = False
    loss_wavers: bool = False
    vicreg_weights: bool = False
    takes_places: bool = False
    whole_patches: bool = False
    encodes: bool = False
    uses_expander: bool = True
    one_encoder: str | None = None
    tuned: Mapping[str, tuple[float, float] | None] = field(default_factory=dict)
    expander_sizes: Callable[[int], list[int]] = expander_for

    def remedy_for(self, name: str, usual: str) -> str:
        """Return what to do about what the doctor finds by a name, where it is `usual` to do something."""
        return self.remedies.get(name, usual)
