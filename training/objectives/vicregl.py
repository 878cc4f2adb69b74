"""VICRegL; the loss is in `modeling/vicregl.py`."""

from hf_vicreg.training.objectives.entry import ObjectiveEntry, SectionFlag

VICREGL = ObjectiveEntry(
    name="vicregl",
    title="VICRegL",
    parts=("invariance", "variance", "covariance", "local_invariance", "local_variance", "local_covariance"),
    settings={
        "alpha": SectionFlag(0.75, "FLOAT", "Share of the loss of whole images; the rest is of their patches."),
        "num_matches": SectionFlag(
            [20, 4], "[LARGE,SMALL]", "Patches of a large and of a small view that are matched."
        ),
        "local_expander_sizes": SectionFlag([512, 512, 512], "[INT,...]", "Widths of the expander of the patches."),
    },
    loss_falls=True,
    vicreg_weights=True,
    tuned={"vicreg.covariance_weight": None},
    takes_places=True,
    one_encoder="its patches are of one",
)
