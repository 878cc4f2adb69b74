"""SimMIM on a BigBirdViT: the encoder sees mask tokens in place of masked patches, a linear layer paints all."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import MaskedImageModelingOutput
from transformers.utils.generic import can_return_tuple

from .call_checks import check_inputs, check_masked
from .configuration_bigbird_vit import BigBirdViTConfig
from .image_patches import masked_means, patchify, unpatchify
from .modeling_bigbird_vit import BigBirdViTModel, BigBirdViTPreTrainedModel


class BigBirdViTSimMIMHead(nn.Module):
    """A mask token, and a linear layer from each patch's feature to its pixels."""

    def __init__(self, config: BigBirdViTConfig):
        super().__init__()
        self.config = config
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size))
        nn.init.trunc_normal_(self.mask_token, std=config.initializer_range)
        height, width = config.patch_size_hw
        self.decoder = nn.Linear(config.hidden_size, height * width * config.num_channels)

    def forward(
        self, last_hidden_state: torch.Tensor, pixel_values: torch.Tensor, masked: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return each image's loss `(batch,)`, in at least fp32, and all pixels `(batch, patches, of a patch)`.

        Args:
            last_hidden_state: Of the encoder.
            pixel_values: `(batch, channels, height, width)`, the images.
            masked: `(batch, patches)` bool, the patches that count; without it there is no loss.
        """
        painted = self.decoder(last_hidden_state[:, 1 + self.config.num_register_tokens :])
        if masked is None:
            return None, painted
        dtype = torch.promote_types(painted.dtype, torch.float32)
        target = patchify(pixel_values, self.config.patch_size_hw).to(painted.device, dtype)
        errors = (painted.to(dtype) - target).abs().mean(-1)
        return masked_means(errors, masked.to(painted.device)), painted


class BigBirdViTForMaskedImageModeling(BigBirdViTPreTrainedModel):
    """The encoder and SimMIM's head.

    The mask token is the head's: the encoder's weights are those of any `BigBirdViTModel`.

    Source: Xie et al. 2021, SimMIM (arXiv 2111.09886), sections 3.2 to 3.4.
    """

    def __init__(self, config: BigBirdViTConfig):
        super().__init__(config)
        self.bigbird_vit = BigBirdViTModel(config, add_pooling_layer=False)
        self.head = BigBirdViTSimMIMHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BigBirdViTSimMIMHead):
            init.trunc_normal_(module.mask_token, mean=0.0, std=self.config.initializer_range)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> MaskedImageModelingOutput:
        """Paint images of which some patches are masked.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            bool_masked_pos: `(batch, patches)` bool, or integers 0 and 1, in raster order: 1 for masked patches.
            pixel_mask: `(batch, height, width)`, as for `BigBirdViTModel`; padding counts for nothing in the loss.
            kwargs: As for `BigBirdViTModel`.

        Returns:
            `reconstruction` `(batch, channels, rows * patch height, columns * patch width)` and, with a mask, `loss`:
            the mean absolute difference over the pixels of masked patches, image by image (see `masked_means`).

        Raises:
            ValueError: A mask of another shape or type, patches that overlap, and what `BigBirdViTModel` refuses.
        """
        check_inputs(self.config, pixel_values, pixel_mask)
        assert pixel_values is not None  # for the type checker; checked above
        masked = None
        if bool_masked_pos is not None:
            masked = check_masked(self.config, pixel_values, bool_masked_pos)
        masks = {"masked_patches": masked, "mask_token": self.head.mask_token}
        outputs = self.bigbird_vit(pixel_values, pixel_mask, **kwargs | masks | {"return_dict": True})
        if masked is not None and pixel_mask is not None:
            masked = masked & self.bigbird_vit.embeddings.valid_patches(pixel_mask).flatten(1)
        errors, painted = self.head(outputs.last_hidden_state, pixel_values, masked)
        grid = self.config.grid_size(*pixel_values.shape[-2:])
        return MaskedImageModelingOutput(
            loss=None if errors is None else errors.mean(),
            reconstruction=unpatchify(painted, grid, self.config.patch_size_hw),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["BigBirdViTForMaskedImageModeling"]
