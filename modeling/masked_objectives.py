"""Masked images as methods of pretraining: MAE and SimMIM on the views of a step, in place of two views that agree.

Each view of a step has one mask, the same for all images, processes and passes: it follows from the seed of the masks,
the step and the view. So the loss of the whole batch is the mean of its images' losses, however they are shared out.
"""

import copy
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .configuration_bigbird_mae import BigBirdViTMAEConfig
from .global_batch import global_size, global_sum
from .modeling_bigbird_mae import BigBirdViTMAEDecoder, BigBirdViTMAEForPreTraining
from .modeling_bigbird_masked_image import BigBirdViTForMaskedImageModeling, BigBirdViTSimMIMHead
from .objective import Objective, Terms
from .visible_patches import draw_masked_patches

MASKING = {"mask_ratio": 0.75, "mask_tile_size": 0, "mask_seed": 0}


class Masked(NamedTuple):
    """What a method makes of some images: each one's loss, all its pixels as patches, and its pooled feature."""

    errors: torch.Tensor
    pixels: torch.Tensor
    pooled: torch.Tensor


class MaskedObjective(Objective):
    """What both methods share: masks, and a loss that is a mean over images.

    Attributes:
        step: What the masks are drawn for.
    """

    encodes = True
    uses_expander = False
    further_per_image = 1

    def __init__(self, config, encoder, expander):
        super().__init__(config, encoder, expander)
        self.fields = mae_config(config.encoder, self.settings)
        self.step = 0

    @classmethod
    def check(cls, settings, config):
        if config.second_encoder is not None:
            raise ValueError(f"`second_encoder`: expected none with {cls.name}, which paints with one encoder.")
        mae_config(config.encoder, settings)

    @classmethod
    def check_views(cls, settings, config, image_size):
        fields = mae_config(config.encoder, settings)
        draw_masked_patches(
            config.encoder.grid_size(*image_size), fields.mask_tile_size_hw, fields.mask_ratio, "check"
        )

    def begin_step(self, model, step, num_steps):
        self.step = step

    def draw_mask(self, height, width, key):
        """Return a mask `(patches,)` bool for images of so many pixels; `key` is what it depends on."""
        grid = self.fields.encoder.grid_size(height, width)
        return draw_masked_patches(grid, self.fields.mask_tile_size_hw, self.fields.mask_ratio, key)

    def encode(self, encoder, inputs):
        """Return pooled features of each view, and the mean of their losses for each image."""
        found = []
        for index, view in enumerate(inputs):
            pixel_values = view["pixel_values"]
            key = f"{self.settings['mask_seed']}/{self.step}/{index}"
            height, width = pixel_values.shape[-2:]
            mask = self.draw_mask(height, width, key)
            found.append(self.paint(encoder, pixel_values, mask))
        return [one.pooled for one in found], [torch.stack([one.errors for one in found]).mean(0)]

    def paint(self, encoder, pixel_values, masked) -> Masked:
        """Return what is made of images `(batch, channels, height, width)` with masks `(batch, patches)`, or one."""
        raise NotImplementedError

    def forward(self, embeddings, further, process_group):
        (errors,) = further
        loss = global_sum(errors.sum(), process_group) / global_size(errors, process_group)
        return Terms(loss, {"reconstruction": loss})


class MAE(MaskedObjective):
    """The encoder sees the visible tiles alone; see `modeling_bigbird_mae.py`. `norm_pix_loss` is 0 or 1."""

    name = "mae"
    defaults = MASKING | {
        "decoder_hidden_size": 192,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 6,
        "decoder_intermediate_size": 768,
        "norm_pix_loss": 0,
    }

    def __init__(self, config, encoder, expander):
        super().__init__(config, encoder, expander)
        self.decoder = BigBirdViTMAEDecoder(
            self.fields.decoder_config(), config.encoder.hidden_size, self.fields.norm_pix_loss
        )

    def paint(self, encoder, pixel_values, masked):
        painted = self.decoder(encoder, pixel_values, masked, {})
        return Masked(painted.errors, painted.pixels, painted.pooled)


class SimMIM(MaskedObjective):
    """Mask tokens take the place of hidden patches in the encoder; see `modeling_bigbird_masked_image.py`."""

    name = "simmim"
    defaults = MASKING | {"mask_ratio": 0.6}

    def __init__(self, config, encoder, expander):
        super().__init__(config, encoder, expander)
        self.head = BigBirdViTSimMIMHead(config.encoder)

    def paint(self, encoder, pixel_values, masked):
        masked = masked.to(pixel_values.device).expand(len(pixel_values), -1)
        outputs = encoder(pixel_values, masked_patches=masked, mask_token=self.head.mask_token)
        errors, pixels = self.head(outputs.last_hidden_state, pixel_values, masked)
        return Masked(errors, pixels, outputs.pooler_output)


def masked_part(objective: Objective) -> MaskedObjective | None:
    """Return the method of masked images that an objective is, or has among several; None where there is none."""
    return next((one for one in objective.modules() if isinstance(one, MaskedObjective)), None)


def painter_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the encoder and decoder of a `VicRegForPreTraining` with one of these methods, as a model that paints."""
    objective: Any = masked_part(model.objective)
    if isinstance(objective, MAE):
        painter: PreTrainedModel = BigBirdViTMAEForPreTraining(objective.fields)
        painter.encoder.load_state_dict(model.encoder.state_dict(), strict=False)  # it pools, and has no pooler
        painter.decoder.load_state_dict(objective.decoder.state_dict())
    else:
        painter = BigBirdViTForMaskedImageModeling(objective.fields.encoder)
        painter.bigbird_vit.load_state_dict(model.encoder.state_dict(), strict=False)
        painter.head.load_state_dict(objective.head.state_dict())
    return painter.eval()


def mae_config(encoder, settings) -> BigBirdViTMAEConfig:
    """Return the configuration of a masked autoencoder with the settings of either method.

    Raises:
        ValueError: An encoder that cannot be masked, or a setting out of range.
    """
    fields = {name: value for name, value in settings.items() if name not in ("mask_seed", "mask_tile_size")}
    if fields.get("norm_pix_loss", 0) not in (0, 1):
        raise ValueError(f"`norm_pix_loss`: expected 0 or 1, got {fields['norm_pix_loss']}.")
    if settings["mask_tile_size"] < 0:
        raise ValueError(
            f"`mask_tile_size`: expected a side in patches, or 0 for the encoder's tile, "
            f"got {settings['mask_tile_size']}."
        )
    fields["norm_pix_loss"] = bool(fields.get("norm_pix_loss", 0))
    own = copy.deepcopy(encoder)  # a configuration around another tells it how to attend
    return BigBirdViTMAEConfig(encoder=own, mask_tile_size=settings["mask_tile_size"] or None, **fields)


__all__ = ["MAE", "MaskedObjective", "SimMIM", "masked_part", "painter_of"]
