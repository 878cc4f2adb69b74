"""Configuration of VICReg pretraining: an encoder, an expander and the weights of the loss."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_bigbird_vit import BigBirdViTConfig


@strict
class VicRegConfig(PreTrainedConfig):
    r"""Configuration of `VicRegForPreTraining`.

    Args:
        encoder: Configuration of the encoder, an instance or a dictionary with `model_type`: any vision model that
            `AutoModel` builds from a config. Default: `BigBirdViTConfig()`.
        expander_sizes: Widths of the expander's layers; the last is the width D of the embeddings.
        expander_norm: Normalisation of its hidden layers: `"batch"` (over the global batch, the paper's) or `"layer"`.
        invariance_weight: Lambda.
        variance_weight: Mu. Keep it equal to lambda.
        covariance_weight: Nu, well below mu.
        gamma: Target standard deviation of every dimension.
        eps: Added to the variance under the root.
    """

    model_type = "vicreg"
    sub_configs = {"encoder": AutoConfig}  # noqa: RUF012  transformers' own form

    encoder: Any = None
    expander_sizes: list[int] | tuple[int, ...] = (8192, 8192, 8192)
    expander_norm: Literal["batch", "layer"] = "batch"
    invariance_weight: float | int = 25.0
    variance_weight: float | int = 25.0
    covariance_weight: float | int = 1.0
    gamma: float | int = 1.0
    eps: float | int = 1e-4

    def __post_init__(self, **kwargs):
        if self.encoder is None:
            self.encoder = BigBirdViTConfig()
        elif isinstance(self.encoder, dict):
            self.encoder = encoder_config(self.encoder)
        if not isinstance(self.encoder, PreTrainedConfig):
            raise ValueError(f"`encoder`: expected a configuration or its fields, got {type(self.encoder).__name__}.")
        super().__post_init__(**kwargs)

    def validate_vicreg(self):
        """Check what the field types cannot say; run at creation and before saving.

        Raises:
            ValueError: A field out of range, with the field, the expectation and the value found.
        """
        if not self.expander_sizes or min(self.expander_sizes) < 1:
            raise ValueError(f"`expander_sizes`: expected at least one positive width, got {self.expander_sizes}.")
        if not self.eps > 0:
            raise ValueError(
                f"`eps`: expected a number above 0, got {self.eps}; a constant dimension has no gradient."
            )
        for name in ("invariance_weight", "variance_weight", "covariance_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}`: expected a number of at least 0, got {getattr(self, name)}.")


def encoder_config(fields: dict) -> PreTrainedConfig:
    """Return the configuration of any encoder from a dictionary; `model_type` defaults to `"bigbird_vit"`.

    The default encoder is built from its sibling module, so that it needs no registration.
    """
    fields = dict(fields)
    model_type = fields.pop("model_type", BigBirdViTConfig.model_type)
    if model_type == BigBirdViTConfig.model_type:
        return BigBirdViTConfig(**fields)
    return AutoConfig.for_model(model_type, **fields)


__all__ = ["VicRegConfig", "encoder_config"]
