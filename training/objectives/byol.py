"""BYOL; the loss and its teacher are in `modeling/byol.py`."""

from hf_vicreg.training.objectives.entry import ObjectiveEntry, SectionFlag

BYOL = ObjectiveEntry(
    name="byol",
    title="BYOL",
    parts=("prediction_error",),
    settings={
        "momentum": SectionFlag(0.996, "FLOAT", "Share of itself that the teacher keeps at first; then up to 1.")
    },
    remedies={
        "embedding collapse": "raise byol.momentum towards 1, lower learning_rate, and keep "
        "vicreg.expander_norm at batch",
        "dimensional collapse": "raise byol.momentum towards 1 or batch_size, or lower learning_rate",
        "not sure": "probably learning_rate is too high: lower it by three times; if that does not help, raise "
        "byol.momentum towards 1",
    },
    silent=frozenset({"batch too small"}),
    unit_sphere=True,
    tuned={"byol.momentum": (0.97, 0.999)},
    one_encoder="its predictor and its teacher are of one",
    expander_sizes=lambda batch: [min(4096, max(128, 8 * batch)), 256],
)
