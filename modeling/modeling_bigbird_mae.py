"""Masked autoencoder: the encoder runs on the visible patches alone, a light decoder paints the rest."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .bigbird_pattern import block_pattern
from .call_checks import asks_for, check_inputs, check_keywords, check_masked
from .configuration_bigbird_mae import BigBirdViTMAEConfig
from .configuration_bigbird_vit import BigBirdViTConfig
from .grid_plan import PatternCache, grid_plan, pattern_settings, reorder
from .image_patches import masked_means, patch_statistics, patchify, unpatchify
from .modeling_bigbird_vit import BigBirdViTEncoder, BigBirdViTModel
from .pattern_tables import BlockPattern, derived, ordinary_tensors
from .visible_patches import draw_masked_patches, visible_patterns

MAX_BYTES_OF_MASKS = 2**26  # masks come and go: those of a step or two are kept


@dataclass
class BigBirdViTMAEOutput(ModelOutput):
    """What `BigBirdViTMAEForPreTraining` returns.

    Attributes:
        loss: Scalar, the mean squared difference over masked patches.
        reconstruction: `(batch, channels, rows * patch height, columns * patch width)`, pixels of all patches. With
            `norm_pix_loss` the decoder paints normalised patches; the image's means and deviations are put back.
        mask: `(batch, patches)` int64, 1 for patches that were masked; what `bool_masked_pos` takes.
        representations: `(batch, hidden_size)`, the encoder's pooled output of the visible patches.
        hidden_states: With `output_hidden_states`, the encoder's, of its visible tokens.
        attentions: With `output_attentions`, likewise.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    representations: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class Painted(NamedTuple):
    """What a decoder makes of a batch.

    Attributes:
        errors: `(batch,)`, each image's mean squared difference over its masked patches, in at least fp32.
        pixels: `(batch, patches, pixels of a patch)`, likewise.
        pooled: `(batch, hidden_size)`, the encoder's pooled output of the visible patches.
        states: What the encoder recorded.
    """

    errors: torch.Tensor
    pixels: torch.Tensor
    pooled: torch.Tensor
    states: dict[str, Any]


class BigBirdViTMAEDecoder(nn.Module):
    """A few layers on all patches of the grid, a mask token in place of each hidden one, and their pixels.

    The encoder is an argument, so that the decoder goes with any model that has one.
    """

    def __init__(self, config: BigBirdViTConfig, encoder_size: int, norm_pix_loss: bool):
        super().__init__()
        self.config, self.norm_pix_loss = config, norm_pix_loss
        self.embedding = nn.Linear(encoder_size, config.hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size))
        nn.init.trunc_normal_(self.mask_token, std=config.initializer_range)
        self.encoder = BigBirdViTEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        height, width = config.patch_size_hw
        self.prediction = nn.Linear(config.hidden_size, height * width * config.num_channels)
        self._patterns = PatternCache()
        self._visible = PatternCache(MAX_BYTES_OF_MASKS)

    def _apply(self, *arguments, **keywords):
        for cache in (self._patterns, self._visible):
            cache.clear()  # their tables are on the device that the model leaves
        return super()._apply(*arguments, **keywords)

    def forward(
        self, encoder: BigBirdViTModel, pixel_values: torch.Tensor, masked: torch.Tensor, flags: dict[str, Any]
    ) -> Painted:
        """Return what is painted of images `(batch, channels, height, width)` with masks `(batch, patches)` bool.

        Args:
            encoder: Runs on the visible patches.
            pixel_values: The images.
            masked: Their masks; or `(patches,)` on the CPU, one for all images.
            flags: `output_hidden_states` and `output_attentions`, of the encoder.
        """
        size = pixel_values.shape[-2:]
        tokens, pooled, states = self._encode(encoder, pixel_values, masked, flags)
        painted = self._decode(tokens, self._whole_patterns(*size))
        dtype = torch.promote_types(painted.dtype, torch.float32)
        target = patchify(pixel_values, self.config.patch_size_hw).to(painted.device, dtype)
        pixels = painted = painted.to(dtype)
        if self.norm_pix_loss:
            mean, deviation = patch_statistics(target)
            target, pixels = (target - mean) / deviation, painted * deviation + mean
        errors = masked_means((painted - target).square().mean(-1), masked.to(painted.device).expand(len(painted), -1))
        return Painted(errors, pixels, pooled, states)

    def _encode(self, encoder: BigBirdViTModel, pixel_values: torch.Tensor, masked: torch.Tensor, flags: dict):
        """Return tokens `(batch, tokens, width)` with mask tokens, pooled outputs and recorded states."""
        mask_of = None
        masks = [masked]  # a planner's shapes have no values, a mask has
        if masked.ndim > 1:
            different, mask_of = masked.cpu().unique(dim=0, return_inverse=True)
            masks = list(different)
        if any(flags.values()) and len(masks) > 1:
            raise ValueError(
                f"`output_hidden_states`, `output_attentions`: expected one mask for all images, got {len(masks)}."
            )
        tokens, pooled, order = [], [], []
        for index, mask in enumerate(masks):
            of_mask = pixel_values
            if mask_of is not None and len(masks) > 1:
                images = (mask_of == index).nonzero()[:, 0]
                of_mask = pixel_values[images.to(pixel_values.device)]
                order.append(images)
            whole = tuple(encoder.attention_patterns(*pixel_values.shape[-2:]))
            patterns, kept = self._visible_patterns(whole, mask)
            outputs = encoder(of_mask, attention_patterns=patterns, **flags)
            tokens.append(self._with_mask_tokens(outputs.last_hidden_state, kept, whole[0].num_tokens))
            pooled.append(outputs.pooler_output)
        place = None if len(masks) == 1 else torch.cat(order).argsort().to(tokens[0].device)
        states = {name: getattr(outputs, name) for name in ("hidden_states", "attentions")}
        return reorder(torch.cat(tokens), place, 0), reorder(torch.cat(pooled), place, 0), states

    def _with_mask_tokens(self, encoded: torch.Tensor, kept: torch.Tensor, num_tokens: int) -> torch.Tensor:
        embedded = self.embedding(encoded)
        tokens = self.mask_token.to(embedded.dtype).expand(len(embedded), num_tokens, -1)
        return tokens.index_copy(1, kept.to(embedded.device), embedded)

    def _decode(self, tokens: torch.Tensor, patterns: tuple[BlockPattern, ...]) -> torch.Tensor:
        """Return `(batch, patches, pixels of a patch)` of tokens in raster order."""
        plan = derived(patterns[0], grid_plan, self.config.head_dim, self.config.rope_theta, tokens.device)
        assert plan.rotary is not None  # a decoder's positions are rotary
        rotary = plan.rotary[0].to(tokens.dtype), plan.rotary[1].to(tokens.dtype)
        decoded = self.encoder(reorder(tokens, plan.to_tiles, 1), None, patterns, rotary).last_hidden_state
        patches = reorder(decoded, plan.to_raster, 1)[:, 1 + self.config.num_register_tokens :]
        return self.prediction(self.layernorm(patches))

    @ordinary_tensors()
    def _visible_patterns(
        self, whole: tuple[BlockPattern, ...], mask: torch.Tensor
    ) -> tuple[list[BlockPattern], torch.Tensor]:
        """Return each layer's pattern of the visible patches, and which tokens those are, global ones first."""
        visible, num_global = ~mask, whole[0].num_global_tokens
        kept = torch.cat([torch.arange(num_global), visible.nonzero()[:, 0] + num_global])
        key = (tuple(one.name for one in dict.fromkeys(whole)), bytes(visible.to(torch.uint8).tolist()))
        return list(self._visible.get(key, lambda: visible_patterns(whole, visible))), kept

    def _whole_patterns(self, height: int, width: int) -> tuple[BlockPattern, ...]:
        layers, (rows, columns) = self.config.num_hidden_layers, self.config.grid_size(height, width)
        settings = pattern_settings(self.config, rows, columns)

        def make() -> list[BlockPattern]:
            return [block_pattern(rows, columns, **settings, layer=layer) for layer in range(layers)]

        return self._patterns.get((rows, columns, *settings.values()), make)


class BigBirdViTMAEForPreTraining(PreTrainedModel):
    """A BigBirdViT on the visible patches, a light decoder, and the loss on the masked ones.

    Source: He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377), section 3. Masks are
    of whole tiles, the decoder's positions are rotary, and CLS and registers pass through it as patches do.
    """

    config: BigBirdViTMAEConfig
    config_class = BigBirdViTMAEConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a batch's own, not a sum over `num_items_in_batch`
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config: BigBirdViTMAEConfig):
        super().__init__(config)
        self.encoder = BigBirdViTModel(config.encoder, add_pooling_layer=False)
        decoder = config.decoder_config()
        decoder._attn_implementation = config._attn_implementation
        self.decoder = BigBirdViTMAEDecoder(decoder, config.encoder.hidden_size, config.norm_pix_loss)
        self._loss_function = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.encoder.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, BigBirdViTMAEDecoder):
            init.trunc_normal_(module.mask_token, mean=0.0, std=std)

    def draw_mask(self, height: int, width: int, key: str) -> torch.Tensor:
        """Return a mask `(patches,)` bool on the CPU for images of `height` x `width` pixels.

        Args:
            height: In pixels.
            width: In pixels.
            key: What the draw depends on, a seed and a step for example.

        Raises:
            ValueError: Images of a single tile, or smaller than a patch.
        """
        grid = self.config.encoder.grid_size(height, width)
        return draw_masked_patches(grid, self.config.mask_tile_size_hw, self.config.mask_ratio, key)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        **kwargs,
    ) -> BigBirdViTMAEOutput:
        """Return the loss of a batch of images of which some patches are masked, and what is painted.

        Images of one mask go through the encoder together: a batch with one mask costs least, for a mask of each
        image's own the encoder runs image by image.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            bool_masked_pos: `(batch, patches)` bool, or integers 0 and 1, in raster order: 1 for masked patches. On
                the CPU no device is waited for. Without it one mask is drawn for the batch: in training from torch's
                generator, in evaluation always the same.
            kwargs: `return_dict`, `output_hidden_states`, `output_attentions`; what they record is of one mask alone.

        Raises:
            ValueError: A mask of another shape or type or of all patches, states of several masks, and what
                `BigBirdViTModel` refuses.
            TypeError: A keyword that is none of these.
        """
        check_keywords(kwargs, ("pixel_values", "bool_masked_pos"))
        check_inputs(self.config.encoder, pixel_values, None)
        assert pixel_values is not None  # for the type checker; checked above
        height, width = pixel_values.shape[-2:]
        if bool_masked_pos is None:
            draw = int(torch.randint(2**62, ())) if self.training else 0
            bool_masked_pos = self.draw_mask(height, width, str(draw)).repeat(len(pixel_values), 1)
        masked = check_masked(self.config.encoder, pixel_values, bool_masked_pos)
        # a keyword may be a list of layers
        flags = {
            f"output_{name}": kwargs.get(f"output_{name}") or asks_for(name, self.config, kwargs)
            for name in ("hidden_states", "attentions")
        }
        painted = self.decoder(self.encoder, pixel_values, masked, flags)
        grid = self.config.encoder.grid_size(height, width)
        return BigBirdViTMAEOutput(
            loss=painted.errors.mean(),
            reconstruction=unpatchify(painted.pixels, grid, self.config.encoder.patch_size_hw),
            mask=masked.long(),
            representations=painted.pooled,
            **painted.states,
        )


__all__ = ["BigBirdViTMAEForPreTraining", "BigBirdViTMAEOutput"]
