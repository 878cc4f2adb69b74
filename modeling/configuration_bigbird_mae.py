"""Configuration of a masked autoencoder: an encoder, a light decoder and how images are masked."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_bigbird_vit import BigBirdViTConfig
from .visible_patches import check_mask_ratio


@strict
class BigBirdViTMAEConfig(PreTrainedConfig):
    r"""Configuration of `BigBirdViTMAEForPreTraining`.

    Args:
        encoder: Configuration of the encoder, a `BigBirdViTConfig` or a dictionary of its fields. Default:
            `BigBirdViTConfig()`. Patches may not overlap.
        decoder_hidden_size: Width of the decoder's tokens, a multiple of 4 times `decoder_num_attention_heads`.
        decoder_num_hidden_layers: Its layers, of the encoder's kind and with its pattern of attention.
        decoder_num_attention_heads: Heads a layer.
        decoder_intermediate_size: Hidden width of its MLP.
        mask_ratio: Share of the tiles that is masked, in (0, 1).
        mask_tile_size: Tile of the masks in patches, `int` or `(height, width)`; `None`: the encoder's `tile_size`.
        norm_pix_loss: Whether the target of a patch is its pixels less their mean, over their standard deviation.
    """

    model_type = "bigbird_vit_mae"
    sub_configs = {"encoder": AutoConfig}  # noqa: RUF012  transformers' own form

    encoder: Any = None
    decoder_hidden_size: int = 192
    decoder_num_hidden_layers: int = 2
    decoder_num_attention_heads: int = 6
    decoder_intermediate_size: int = 768
    mask_ratio: float | int = 0.75
    mask_tile_size: int | list[int] | tuple[int, int] | None = None
    norm_pix_loss: bool = False

    def __post_init__(self, **kwargs):
        if self.encoder is None:
            self.encoder = BigBirdViTConfig()
        fields = self.encoder if isinstance(self.encoder, dict) else {}
        kind = fields.get("model_type", getattr(self.encoder, "model_type", BigBirdViTConfig.model_type))
        if kind != BigBirdViTConfig.model_type:
            raise ValueError(
                f"`encoder`: expected a {BigBirdViTConfig.model_type!r}, which runs on visible patches alone, without "
                f"batch norms, got {kind!r}."
            )
        if isinstance(self.encoder, dict):
            self.encoder = BigBirdViTConfig(**{name: value for name, value in fields.items() if name != "model_type"})
        super().__post_init__(**kwargs)

    output_attentions = BigBirdViTConfig.output_attentions
    validate_output_attentions = BigBirdViTConfig.validate_output_attentions

    def validate_masked_autoencoder(self):
        """Check what the field types cannot say; run at creation and before saving.

        Raises:
            ValueError: A field out of range, with the field, the expectation and the value found.
        """
        self.encoder.check_patches_apart()
        check_mask_ratio(self.mask_ratio)
        if min(self.mask_tile_size_hw) < 1:
            raise ValueError(f"`mask_tile_size`: expected at least 1 patch, got {self.mask_tile_size}.")
        unit = 4 * self.decoder_num_attention_heads
        if self.decoder_num_attention_heads < 1 or self.decoder_hidden_size % unit:
            raise ValueError(
                "`decoder_hidden_size`: expected a multiple of 4 times `decoder_num_attention_heads` (at least 1), "
                f"got {self.decoder_hidden_size} and {self.decoder_num_attention_heads}."
            )
        for name in ("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}`: expected at least 1, got {getattr(self, name)}.")

    @property
    def mask_tile_size_hw(self) -> tuple[int, int]:
        """Tile of the masks, (height, width) in patches."""
        size = self.mask_tile_size
        if size is None:
            return self.encoder.tile_size_hw
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    def decoder_config(self) -> BigBirdViTConfig:
        """Return the decoder's configuration: the encoder's pattern and kind of layer, rotary positions."""
        fields = self.encoder.to_dict() | {
            "hidden_size": self.decoder_hidden_size,
            "num_hidden_layers": self.decoder_num_hidden_layers,
            "num_attention_heads": self.decoder_num_attention_heads,
            "intermediate_size": self.decoder_intermediate_size,
            "position_embedding_type": "rope",
            "pooler_act": None,
            "drop_path_rate": 0.0,
        }
        for name in ("model_type", "auto_map", "architectures", "out_features", "out_indices", "stage_names"):
            fields.pop(name, None)
        return BigBirdViTConfig(**fields)


__all__ = ["BigBirdViTMAEConfig"]
