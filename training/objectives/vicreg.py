"""VICReg, the default; its settings are those of the section `vicreg`."""

from hf_vicreg.training.objectives.entry import ObjectiveEntry

VICREG = ObjectiveEntry(
    name="vicreg",
    title="VICReg",
    parts=("invariance", "variance", "covariance"),
    loss_falls=True,
    vicreg_weights=True,
    tuned={"vicreg.covariance_weight": None},
)
