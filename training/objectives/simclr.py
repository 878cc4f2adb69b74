"""SimCLR; the loss is in `modeling/simclr.py`."""

from hf_vicreg.training.objectives.entry import ObjectiveEntry, SectionFlag

SIMCLR = ObjectiveEntry(
    name="simclr",
    title="SimCLR",
    parts=("alignment", "uniformity"),
    settings={
        "temperature": SectionFlag(0.5, "FLOAT", "Divides the cosines; lower looks at the nearest images more.")
    },
    remedies={
        "embedding collapse": "lower learning_rate, or set simclr.temperature between 0.1 and 0.5",
        "dimensional collapse": "lower learning_rate, raise batch_size, or set simclr.temperature between 0.1 and 0.5",
        "not sure": "probably learning_rate is too high: lower it by three times; if that does not help, raise "
        "batch_size",
    },
    silent=frozenset({"batch too small"}),
    unit_sphere=True,
    tuned={"simclr.temperature": (0.05, 1.0)},
    expander_sizes=lambda batch: [min(2048, max(128, 8 * batch)), 128],
)
