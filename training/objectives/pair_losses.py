"""Rivals of VICReg between two encoders, `vicreg.pair_loss`; the losses are in `modeling/contrastive_loss.py`."""

from hf_vicreg.training.objectives.entry import ObjectiveEntry


def _entry(name: str, title: str) -> ObjectiveEntry:
    return ObjectiveEntry(
        name=name,
        title=title,
        parts=(),
        remedies=dict.fromkeys(("embedding collapse", "dimensional collapse", "not sure"), "lower learning_rate")
        | {"encoder collapse": "lower learning_rate and weight_decay"},
        silent=frozenset({"batch too small"}),
        unit_sphere=True,
    )


PAIR_LOSSES = {one.name: one for one in (_entry("infonce", "InfoNCE"), _entry("siglip", "SigLIP's sigmoid loss"))}
