"""Barlow Twins; the loss is in `modeling/barlow_twins.py`."""

from hf_vicreg.training.objectives.entry import ObjectiveEntry, SectionFlag

BARLOW_TWINS = ObjectiveEntry(
    name="barlow_twins",
    title="Barlow Twins",
    parts=("invariance", "redundancy"),
    settings={
        "redundancy_weight": SectionFlag(0.0051, "FLOAT", "Weight of the correlations between dimensions, lambda.")
    },
    remedies={
        "embedding collapse": "lower learning_rate, or keep barlow_twins.redundancy_weight near 0.0051",
        "dimensional collapse": "raise barlow_twins.redundancy_weight, or lower learning_rate",
        "not sure": "probably learning_rate is too high: lower it by three times; if that does not help, raise "
        "barlow_twins.redundancy_weight",
    },
    silent=frozenset({"batch too small"}),
    unit_sphere=True,
    tuned={"barlow_twins.redundancy_weight": None},
)
