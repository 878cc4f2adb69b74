"""Several objectives at once; what they learn is in `modeling/combined_objectives.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_vicreg.training.objectives.entry import ObjectiveEntry, SectionFlag

# the section of their weights: of the name of each, and what is said of it
WEIGHTS = "objective_weights"
WEIGHT = SectionFlag(1.0, "FLOAT", "Weight of one of several objectives.")


@dataclass(frozen=True)
class CombinedEntry(ObjectiveEntry):
    """Several objectives whose losses are summed.

    Attributes:
        of: Their own entries.
    """

    of: tuple[ObjectiveEntry, ...] = ()

    def remedy_for(self, name: str, usual: str) -> str:
        """Return what each of them advises that does not keep silent, each word once."""
        asked = [one for one in self.of if name not in one.silent]
        return "; or ".join(dict.fromkeys(one.remedy_for(name, usual) for one in asked))


def combined(entries: Sequence[ObjectiveEntry]) -> CombinedEntry:
    """Return the entry of several objectives together.

    What one of them has to say of embeddings counts, not what one without embeddings says; and their rules hold where
    they hold for all.
    """
    seen = [one for one in entries if one.uses_expander]
    *most, last = (one.title for one in entries)
    return CombinedEntry(
        name="+".join(one.name for one in entries),
        title=f"{', '.join(most)} and {last}",
        parts=tuple(f"{one.name}_{part}" for one in entries for part in ("loss", *one.parts)),
        silent=frozenset.intersection(*(one.silent for one in entries)),
        unit_sphere=bool(seen) and all(one.unit_sphere for one in seen),
        loss_falls=all(one.loss_falls for one in entries),
        loss_wavers=any(one.loss_wavers for one in entries),
        vicreg_weights=any(one.vicreg_weights for one in entries),
        takes_places=any(one.takes_places for one in entries),
        whole_patches=any(one.whole_patches for one in entries),
        encodes=any(one.encodes for one in entries),
        uses_expander=bool(seen),
        one_encoder=next((one.one_encoder for one in entries if one.one_encoder), None),
        tuned={f"{WEIGHTS}.{one.name}": None for one in entries[1:]},
        expander_sizes=(seen or entries)[0].expander_sizes,
        of=tuple(entries),
    )
