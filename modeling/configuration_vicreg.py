"""Configuration of pretraining: an encoder, an expander, the objective and the weights of VICReg's loss."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_bigbird_vit import BigBirdViTConfig
from .contrastive_loss import PairLoss
from .objectives import check_objective
from .vicreg_weights import Convention, check_weights, convention_factors


@strict
class VicRegConfig(PreTrainedConfig):
    r"""Configuration of `VicRegForPreTraining`.

    Args:
        encoder: Configuration of the encoder, an instance or a dictionary with `model_type`: any vision model that
            `AutoModel` builds from a config. Default: `BigBirdViTConfig()`.
        second_encoder: Configuration of the second view's own encoder, of any kind; `None`: one encoder sees both
            views. Two share no weights, and each sees one view of every image; one of texts sees its caption.
        expander_sizes: Widths of the expander's layers; the last is the width D of the embeddings.
        second_expander_sizes: Of the second branch's expander, ending in the same D; `None`: as the first.
        expander_norm: Normalisation of its hidden layers: `"batch"` (over the global batch, the paper's) or `"layer"`.
        invariance_weight: Lambda.
        variance_weight: Mu, or one for each view. Keep it equal to lambda.
        covariance_weight: Nu, or one for each view; well below mu.
        gamma: Target standard deviation of every dimension.
        eps: Added to the variance under the root.
        convention: Whose parts the weights are of: `"official"` (the authors' code), `"paper"`, `"solo-learn"` or
            `"vicregl"`; see `vicreg_weights.py`.
        objective: What is learned; `"vicreg"`, or another of `objectives.py`, which leaves the weights above aside; or
            several with `+` between, whose losses are summed.
        objective_settings: Those of the objective that are not at their defaults; `None` for VICReg. Of several,
            `weights` by name, 1 where there is none, and the settings of each under its name.
        pair_loss: Of two encoders: `"vicreg"`, or a rival, `"infonce"` or `"siglip"`; see `contrastive_loss.py`.
        image_pair_weight: Beside texts, the weight of VICReg's loss between two views of each image; 0: images have
            one view. Source: Mu et al. 2022, SLIP (arXiv 2112.12750), with VICReg in place of SimCLR.
    """

    model_type = "vicreg"
    sub_configs = {"encoder": AutoConfig, "second_encoder": AutoConfig}  # noqa: RUF012  transformers' own form

    encoder: Any = None
    second_encoder: Any = None
    expander_sizes: list[int] | tuple[int, ...] = (8192, 8192, 8192)
    second_expander_sizes: list[int] | tuple[int, ...] | None = None
    expander_norm: Literal["batch", "layer"] = "batch"
    invariance_weight: float | int = 25.0
    variance_weight: float | int | list[float | int] | tuple[float | int, ...] = 25.0
    covariance_weight: float | int | list[float | int] | tuple[float | int, ...] = 1.0
    gamma: float | int = 1.0
    eps: float | int = 1e-4
    convention: Convention = "official"
    objective: str = "vicreg"
    objective_settings: dict | None = None
    pair_loss: PairLoss = "vicreg"
    image_pair_weight: float | int = 0.0

    def __post_init__(self, **kwargs):
        if self.encoder is None:
            self.encoder = BigBirdViTConfig()
        for name in ("encoder", "second_encoder"):
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, encoder_config(value))
            elif not isinstance(value, PreTrainedConfig) and not (name == "second_encoder" and value is None):
                raise ValueError(f"`{name}`: expected a configuration or its fields, got {type(value).__name__}.")
        super().__post_init__(**kwargs)

    output_attentions = BigBirdViTConfig.output_attentions
    validate_output_attentions = BigBirdViTConfig.validate_output_attentions

    def validate_vicreg(self):
        """Check what the field types cannot say; run at creation and before saving.

        Raises:
            ValueError: A field out of range, with the field, the expectation and the value found.
        """
        for name in ("expander_sizes", "second_expander_sizes"):
            sizes = getattr(self, name)
            if sizes is not None and (not sizes or min(sizes) < 1):
                raise ValueError(f"`{name}`: expected at least one positive width, got {sizes}.")
        if self.second_expander_sizes is not None:
            if self.second_encoder is None:
                raise ValueError("`second_expander_sizes`: expected a `second_encoder` as well, got none.")
            if self.second_expander_sizes[-1] != self.expander_sizes[-1]:
                raise ValueError(
                    "`second_expander_sizes`: expected embeddings as wide as the first branch's, "
                    f"{self.expander_sizes[-1]}, got {self.second_expander_sizes[-1]}."
                )
        if self.image_pair_weight < 0 or (self.image_pair_weight and self.second_encoder is None):
            raise ValueError(
                "`image_pair_weight`: expected at least 0, and 0 without a `second_encoder` of texts, got "
                f"{self.image_pair_weight}."
            )
        if not self.eps > 0:
            raise ValueError(
                f"`eps`: expected a number above 0, got {self.eps}; a constant dimension has no gradient."
            )
        check_weights(self.invariance_weight, self.variance_weight, self.covariance_weight, self.gamma, self.eps)
        convention_factors(self.convention, self.expander_sizes[-1])
        check_objective(self)


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
