"""Configuration of a model of images and texts: two encoders that share nothing, and a projection for each."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_bigbird_vit import BigBirdViTConfig
from .configuration_vicreg import encoder_config


@strict
class VicRegDualEncoderConfig(PreTrainedConfig):
    r"""Configuration of `VicRegDualEncoder`.

    Args:
        vision_config: Configuration of the encoder of images, an instance or a dictionary with `model_type`. Default:
            `BigBirdViTConfig()`.
        text_config: The same of the encoder of texts. Default: transformers' DistilBERT.
        vision_projection_sizes: Widths of the layers from pooled images to embeddings; the last is the embeddings'.
        text_projection_sizes: The same for texts, ending in the same width.
        projection_norm: Normalisation of their hidden layers, `"batch"` or `"layer"`.
        logit_scale_init_value: Logarithm of what cosines are multiplied by.
    """

    model_type = "vicreg_dual_encoder"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012  transformers' own form

    vision_config: Any = None
    text_config: Any = None
    vision_projection_sizes: list[int] | tuple[int, ...] = (512, 512)
    text_projection_sizes: list[int] | tuple[int, ...] = (512, 512)
    projection_norm: str = "batch"
    logit_scale_init_value: float | int = 2.6592

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = BigBirdViTConfig()
        if self.text_config is None:
            self.text_config = {"model_type": "distilbert"}
        for name in ("vision_config", "text_config"):
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, encoder_config(value))
            elif not isinstance(value, PreTrainedConfig):
                raise ValueError(f"`{name}`: expected a configuration or its fields, got {type(value).__name__}.")
        super().__post_init__(**kwargs)

    output_attentions = BigBirdViTConfig.output_attentions
    validate_output_attentions = BigBirdViTConfig.validate_output_attentions

    def validate_dual_encoder(self):
        """Check what the field types cannot say; run at creation and before saving.

        Raises:
            ValueError: A field out of range, with the field, the expectation and the value found.
        """
        for name in ("vision_projection_sizes", "text_projection_sizes"):
            sizes = getattr(self, name)
            if not sizes or min(sizes) < 1:
                raise ValueError(f"`{name}`: expected at least one positive width, got {sizes}.")
        if self.vision_projection_sizes[-1] != self.text_projection_sizes[-1]:
            raise ValueError(
                f"`text_projection_sizes`: expected embeddings as wide as those of images, "
                f"{self.vision_projection_sizes[-1]}, got {self.text_projection_sizes[-1]}."
            )
        if self.projection_norm not in ("batch", "layer"):
            raise ValueError(f"`projection_norm`: expected 'batch' or 'layer', got {self.projection_norm!r}.")


__all__ = ["VicRegDualEncoderConfig"]
