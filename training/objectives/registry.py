"""The objectives by name."""

from hf_vicreg.training.errors import hint
from hf_vicreg.training.objectives.barlow_twins import BARLOW_TWINS
from hf_vicreg.training.objectives.byol import BYOL
from hf_vicreg.training.objectives.combined import combined
from hf_vicreg.training.objectives.entry import ObjectiveEntry
from hf_vicreg.training.objectives.masked import MAE, SIMMIM
from hf_vicreg.training.objectives.pair_losses import PAIR_LOSSES
from hf_vicreg.training.objectives.sigreg import SIGREG
from hf_vicreg.training.objectives.simclr import SIMCLR
from hf_vicreg.training.objectives.vicreg import VICREG
from hf_vicreg.training.objectives.vicregl import VICREGL

ENTRIES: dict[str, ObjectiveEntry] = {
    one.name: one for one in (VICREG, VICREGL, SIMCLR, BARLOW_TWINS, SIGREG, BYOL, MAE, SIMMIM)
}
# of the settings: VICReg's own section is older than the others, and holds the expander of all
OBJECTIVE_SECTIONS = tuple(name for name, one in ENTRIES.items() if one.settings)


def entries_of(objective: str) -> list[ObjectiveEntry]:
    """Return the entries of an `objective`, one or several with `+` between; none if one of them is unknown."""
    names = str(objective).split("+")
    return [ENTRIES[name] for name in names] if all(name in ENTRIES for name in names) else []


def entry_named(objective: str) -> ObjectiveEntry | None:
    """Return the entry of an `objective`, of several together; None where there is none."""
    entries = entries_of(objective)
    return combined(entries) if len(entries) > 1 else next(iter(entries), None)


def entry_of(recipe: dict) -> ObjectiveEntry:
    """Return the entry of what a recipe trains: VICReg's where it names none, or one of another release."""
    pair_loss = (recipe.get("vicreg") or {}).get("pair_loss")
    if pair_loss in PAIR_LOSSES:
        return PAIR_LOSSES[pair_loss]
    return entry_named(str(recipe.get("objective"))) or VICREG


def refused_objective(field: str, name: str) -> str:
    """Return what is said of an objective that there is not."""
    wrong = next((one for one in str(name).split("+") if one not in ENTRIES), "")
    known = f"one of {', '.join(ENTRIES)}, or several with + between"
    return f"`{field}`: expected {known}, got {name!r}{hint(wrong, list(ENTRIES))}"
