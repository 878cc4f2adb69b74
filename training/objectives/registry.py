"""The objectives by name."""

from hf_vicreg.training.objectives.barlow_twins import BARLOW_TWINS
from hf_vicreg.training.objectives.byol import BYOL
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


def entry_of(recipe: dict) -> ObjectiveEntry:
    """Return the entry of what a recipe trains: VICReg's where it names none, or one of another release."""
    pair_loss = (recipe.get("vicreg") or {}).get("pair_loss")
    if pair_loss in PAIR_LOSSES:
        return PAIR_LOSSES[pair_loss]
    return ENTRIES.get(str(recipe.get("objective")), VICREG)
