"""LeJEPA's SIGReg; the loss is in `modeling/sigreg.py`."""

from hf_vicreg.training.objectives.entry import ObjectiveEntry, SectionFlag

SIGREG = ObjectiveEntry(
    name="sigreg",
    title="LeJEPA (SIGReg)",
    parts=("prediction", "sketch"),
    settings={
        "sketch_weight": SectionFlag(
            0.05, "FLOAT", "Weight of the Gaussian's sketch, lambda; the rest is prediction."
        ),
        "num_slices": SectionFlag(1024, "INT", "Random directions that embeddings are compared along, new each step."),
    },
    remedies={
        "embedding collapse": "raise sigreg.sketch_weight, or lower learning_rate",
        "dimensional collapse": "raise sigreg.sketch_weight and batch_size, or lower learning_rate",
        "exploding variance": "raise sigreg.sketch_weight, lower learning_rate, or set max_grad_norm",
        "not sure": "probably learning_rate is too high: lower it by three times; if that does not help, raise "
        "sigreg.sketch_weight",
    },
    silent=frozenset({"batch too small"}),
    tuned={"sigreg.sketch_weight": (0.01, 0.25)},
    expander_sizes=lambda batch: [min(2048, max(128, 8 * batch))] * 2 + [128],
)
