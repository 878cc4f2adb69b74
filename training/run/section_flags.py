"""What the dotted flags `--model.KEY` and `--vicreg.KEY` are, for `--help` and for misspelt ones.

The configurations themselves need torch, which takes seconds to import; a test holds this table against them.
"""

from hf_vicreg.training.objectives.entry import SectionFlag
from hf_vicreg.training.run.view_presets import VIEW_PRESETS

PIXELS = "INT|[HEIGHT,WIDTH]"

MODEL: dict[str, SectionFlag] = {
    "model_type": SectionFlag("bigbird_vit", "NAME", "Kind of encoder: any vision model of transformers."),
    "hidden_size": SectionFlag(384, "INT", "Width of the tokens, a multiple of `num_attention_heads`."),
    "num_hidden_layers": SectionFlag(12, "INT", "Transformer layers."),
    "num_attention_heads": SectionFlag(6, "INT", "Heads a layer."),
    "intermediate_size": SectionFlag(1536, "INT", "Hidden width of the MLP."),
    "hidden_act": SectionFlag("gelu", "NAME", "Activation of the MLP."),
    "use_swiglu_ffn": SectionFlag(False, "true|false", "Gate the MLP."),
    "gate_act": SectionFlag("silu", "NAME", "Activation of the gate."),
    "hidden_dropout_prob": SectionFlag(0.0, "FLOAT", "Dropout after the embeddings."),
    "attention_probs_dropout_prob": SectionFlag(0.0, "FLOAT", "Dropout on the attention probabilities."),
    "drop_path_rate": SectionFlag(0.0, "FLOAT", "Stochastic depth of the last layer."),
    "layerscale_value": SectionFlag(
        None, "FLOAT", "First value of a learned scale on each branch; default: no scale."
    ),
    "initializer_range": SectionFlag(0.02, "FLOAT", "Standard deviation of the first weights."),
    "layer_norm_eps": SectionFlag(1e-6, "FLOAT", "Epsilon of the layer norms."),
    "qkv_bias": SectionFlag(True, "true|false", "Bias of queries, keys and values."),
    "key_bias": SectionFlag(True, "true|false", "Bias of keys beside that of queries and values."),
    "image_size": SectionFlag(224, PIXELS, "Size of the images in pixels."),
    "patch_size": SectionFlag(16, PIXELS, "Size of a patch in pixels."),
    "patch_stride": SectionFlag(None, PIXELS, "Pixels from patch to patch, fewer for overlap; default: `patch_size`."),
    "patch_embedding": SectionFlag("linear", "linear|conv", "One linear map of a patch, or small convolutions."),
    "num_channels": SectionFlag(3, "INT", "Channels of an image, 1 to 64."),
    "num_register_tokens": SectionFlag(0, "INT", "Learned tokens beside CLS."),
    "pooling": SectionFlag("mean", "mean|cls", "What the pooled feature is of: all patches, or CLS."),
    "pooler_act": SectionFlag(None, "NAME", "Activation of a layer after the pooling; default: no such layer."),
    "position_embedding_type": SectionFlag("rope", "rope|absolute", "Rotary positions, or a learned table."),
    "rope_theta": SectionFlag(100.0, "FLOAT", "Base of the rotary frequencies."),
    "interpolate_antialias": SectionFlag(False, "true|false", "Antialias the table when it is resampled."),
    "attention_type": SectionFlag("block_sparse", "block_sparse|original_full", "Sparse attention, or dense."),
    "attention_layout": SectionFlag("tiles", "tiles|raster", "Blocks are rectangles of patches, or runs of them."),
    "tile_size": SectionFlag(4, PIXELS, "Tile in patches; smaller tiles are sparser."),
    "block_size": SectionFlag(64, "INT", "Patches in a block of the `raster` layout."),
    "window_size": SectionFlag(3, "INT", "Side of the local window in tiles, odd."),
    "num_random_blocks": SectionFlag(2, "INT", "Random tiles that each tile sees."),
    "num_global_tiles": SectionFlag(0, "INT", "Tiles that see all and that all see."),
    "attention_seed": SectionFlag(0, "INT", "Seed of the random tiles."),
    "apply_layernorm": SectionFlag(True, "true|false", "Of a backbone: normalise its maps."),
    "reshape_hidden_states": SectionFlag(True, "true|false", "Of a backbone: maps of rows and columns."),
}
VICREG: dict[str, SectionFlag] = {
    "expander_sizes": SectionFlag([8192, 8192, 8192], "[INT,...]", "Widths of the expander's layers."),
    "second_expander_sizes": SectionFlag(None, "[INT,...]", "Of the second branch; default: as the first."),
    "expander_norm": SectionFlag("batch", "batch|layer", "Norm of its hidden layers."),
    "invariance_weight": SectionFlag(25.0, "FLOAT", "Weight of the distance between the views."),
    "variance_weight": SectionFlag(25.0, "FLOAT|[FIRST,SECOND]", "Weight of the spread."),
    "covariance_weight": SectionFlag(1.0, "FLOAT|[FIRST,SECOND]", "Weight of the decorrelation."),
    "gamma": SectionFlag(1.0, "FLOAT", "Standard deviation that every dimension shall have."),
    "eps": SectionFlag(1e-4, "FLOAT", "Added to the variance under the root."),
    "convention": SectionFlag("official", "official|paper|solo-learn|vicregl", "Whose parts the weights are of."),
    "pair_loss": SectionFlag("vicreg", "vicreg|infonce|siglip", "Loss of images and captions, or of two encoders."),
    "image_pair_weight": SectionFlag(0.0, "FLOAT", "Beside captions, weight of VICReg between two views of an image."),
}
# beside the fields of `ViewsConfig`
VIEWS: dict[str, SectionFlag] = {
    "preset": SectionFlag(
        None,
        "NAME",
        f"Augmentations of one kind of images together: {', '.join(VIEW_PRESETS)}; flags of views beside it win.",
    )
}
# of the objectives with `vicreg_weights`; the rest of the section is of all
VICREG_WEIGHTS = (
    *("invariance_weight", "variance_weight", "covariance_weight", "gamma", "eps", "convention"),
    "pair_loss",  # takes VICReg's place, and no other's
)
# fields of every configuration of transformers: taken where they are given, and not worth a line of help
INHERITED = {
    "architectures",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "problem_type",
    "transformers_version",
}

__all__ = ["INHERITED", "MODEL", "VICREG", "VICREG_WEIGHTS", "VIEWS", "SectionFlag"]
