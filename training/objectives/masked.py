"""MAE and SimMIM; what they learn is in `modeling/masked_objectives.py`."""

from hf_vicreg.training.objectives.entry import ObjectiveEntry, SectionFlag

# there are no embeddings: the figures of that name are those of pooled features, which this loss says nothing of
SILENT = frozenset({"embedding collapse", "dimensional collapse", "exploding variance", "batch too small", "not sure"})


def _masking(ratio: float) -> dict[str, SectionFlag]:
    return {
        "mask_ratio": SectionFlag(ratio, "FLOAT", "Share of the tiles that is masked, between 0 and 1."),
        "mask_tile_size": SectionFlag(0, "INT", "Side of a mask's tiles in patches; 0: the encoder's tiles."),
        "mask_seed": SectionFlag(0, "INT", "Of the masks, beside the step."),
    }


MAE = ObjectiveEntry(
    name="mae",
    title="masked autoencoding (MAE)",
    parts=("reconstruction",),
    settings=_masking(0.75)
    | {
        "decoder_hidden_size": SectionFlag(192, "INT", "Width of the decoder, a multiple of 4 times its heads."),
        "decoder_num_hidden_layers": SectionFlag(2, "INT", "Its layers."),
        "decoder_num_attention_heads": SectionFlag(6, "INT", "Its heads a layer."),
        "decoder_intermediate_size": SectionFlag(768, "INT", "Hidden width of its MLP."),
        "norm_pix_loss": SectionFlag(0, "0|1", "Paint patches less their mean, over their deviation."),
    },
    remedies={"encoder collapse": "lower learning_rate and weight_decay, or lower mae.mask_ratio"},
    silent=SILENT,
    loss_falls=True,
    loss_wavers=True,
    tuned={"mae.mask_ratio": (0.4, 0.9)},
    whole_patches=True,
    encodes=True,
    uses_expander=False,
    one_encoder="its decoder is of one",
    expander_sizes=lambda batch: [1],  # there is none
)
SIMMIM = ObjectiveEntry(
    name="simmim",
    title="masked image modelling (SimMIM)",
    parts=("reconstruction",),
    settings=_masking(0.6),
    remedies={"encoder collapse": "lower learning_rate and weight_decay, or lower simmim.mask_ratio"},
    silent=SILENT,
    loss_falls=True,
    loss_wavers=True,
    tuned={"simmim.mask_ratio": (0.3, 0.8)},
    whole_patches=True,
    encodes=True,
    uses_expander=False,
    one_encoder="its decoder is of one",
    expander_sizes=lambda batch: [1],  # there is none
)
