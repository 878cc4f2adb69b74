"""A model of images and texts: embeddings of both in one space, and how alike they are."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_vicreg_dual_encoder import VicRegDualEncoderConfig
from .contrastive_loss import MAX_SCALE
from .encoder_outputs import encoder_outputs, pooled_features
from .modeling_vicreg import VicRegForPreTraining, build_encoder, representation_size
from .vicreg_expander import VicRegExpander


@dataclass
class VicRegDualEncoderOutput(ModelOutput):
    """What `VicRegDualEncoder` returns; of what was not given, `None`.

    Attributes:
        logits_per_image: `(images, texts)`, cosines times the scale.
        logits_per_text: The same, `(texts, images)`.
        image_embeds: `(images, dimensions)`, of unit length.
        text_embeds: `(texts, dimensions)`, of unit length.
    """

    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None


class VicRegDualEncoder(PreTrainedModel):
    """The two branches of an image-text pretraining, encoders and expanders, as a model for retrieval and zero-shot
    classification.
    """

    config: VicRegDualEncoderConfig
    config_class = VicRegDualEncoderConfig
    base_model_prefix = "dual_encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_flex_attn = True  # where the encoders do

    def __init__(self, config: VicRegDualEncoderConfig):
        super().__init__(config)
        self.vision_model = build_encoder(config.vision_config)
        self.text_model = build_encoder(config.text_config)
        norm = config.projection_norm
        self.visual_projection = VicRegExpander(
            representation_size(config.vision_config), config.vision_projection_sizes, norm
        )
        self.text_projection = VicRegExpander(
            representation_size(config.text_config), config.text_projection_sizes, norm
        )
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)

    @classmethod
    def from_pretraining(cls, model: VicRegForPreTraining, parts: Sequence[Any] | None = None) -> "VicRegDualEncoder":
        """Return the two branches of a pretraining: the modules themselves, in the mode they are in, no copies.

        Args:
            model: With a second encoder, of texts.
            parts: Encoders and expanders, as `model.branches`, to take in place of the model's own.

        Raises:
            ValueError: It has one encoder.
        """
        if model.second_encoder is None:
            raise ValueError("`model`: expected a `second_encoder` of texts, got one encoder.")
        own = model.config
        config = VicRegDualEncoderConfig(
            vision_config=own.encoder,
            text_config=own.second_encoder,
            vision_projection_sizes=own.expander_sizes,
            text_projection_sizes=own.second_expander_sizes or own.expander_sizes,
            projection_norm=own.expander_norm,
        )
        with torch.device("meta"):  # no weights are drawn
            dual = cls(config)
        own_parts: Sequence[Any] = parts or model.branches
        dual.vision_model, dual.text_model, dual.visual_projection, dual.text_projection = own_parts
        scale = torch.tensor(float(config.logit_scale_init_value))
        if model.logit_scale is not None:
            scale = model.logit_scale.detach().clamp(max=math.log(MAX_SCALE)).clone()
        dual.logit_scale = nn.Parameter(scale.to(next(model.parameters()).device))
        return dual

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Return what the vision encoder returns, with the embeddings `(images, dimensions)` as `pooler_output`.

        Args:
            pixel_values: `(images, channels, height, width)`.
            kwargs: For the encoder.
        """
        outputs = encoder_outputs(self.vision_model, {"pixel_values": pixel_values} | kwargs)
        return _projected(outputs, self.visual_projection(pooled_features(outputs)))

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Return what the text encoder returns, with the embeddings `(texts, dimensions)` as `pooler_output`.

        Args:
            input_ids: `(texts, tokens)`.
            attention_mask: `(texts, tokens)`, 0 for padding, which changes nothing.
            kwargs: For the encoder; what it does not know of a tokenizer's output (`token_type_ids`) is left out.
        """
        known = inspect.signature(self.text_model.forward).parameters
        kwargs = {name: one for name, one in kwargs.items() if name in known}
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return _projected(outputs, self.text_projection(pooled_features(outputs, attention_mask)))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> VicRegDualEncoderOutput:
        """Return embeddings of images, texts or both, and how alike they are.

        Args:
            pixel_values: `(images, channels, height, width)`.
            input_ids: `(texts, tokens)`.
            attention_mask: `(texts, tokens)`.
            kwargs: For the text encoder.

        Raises:
            ValueError: Neither images nor texts.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("`pixel_values`, `input_ids`: expected one of the two or both, got none.")
        images = texts = logits = None
        if pixel_values is not None:
            images = F.normalize(self.get_image_features(pixel_values).pooler_output, dim=-1)
        if input_ids is not None:
            texts = F.normalize(self.get_text_features(input_ids, attention_mask, **kwargs).pooler_output, dim=-1)
        if images is not None and texts is not None:
            logits = self.logit_scale.exp() * images @ texts.T
        return VicRegDualEncoderOutput(logits, None if logits is None else logits.T, images, texts)


def _projected(outputs: ModelOutput, embeddings: torch.Tensor) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(last_hidden_state=outputs.last_hidden_state, pooler_output=embeddings)


__all__ = ["VicRegDualEncoder", "VicRegDualEncoderOutput"]
