"""BigBird vision transformer: a ViT whose patches attend globally, locally and at random.

The layers work on tokens in tile-major order (see `bigbird_pattern.py`). Tokens are permuted once before the first
layer and put back once after the last: everything a caller sees is in raster order, CLS and registers first.
"""

import operator
import os

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .bigbird_blocks import IMPLEMENTATIONS, BigBirdViTAttention, BigBirdViTLayer, BigBirdViTLayerScale
from .bigbird_pattern import block_pattern
from .bigbird_positions import resampled_positions
from .call_checks import asks_for, check_inputs, check_keywords, warn_of_eager
from .configuration_bigbird_vit import BigBirdViTConfig
from .conv_stem import BigBirdViTConvStem
from .dense_weights import load_dense
from .grid_plan import PatternCache, grid_plan, pattern_settings, reorder, rotary_in_order
from .label_problem import CLASSES, label_problem
from .pattern_tables import BlockPattern, constant, derived


class BigBirdViTEmbeddings(nn.Module):
    """Patches (overlapping if the stride is smaller than the patch), in front of them CLS and registers."""

    def __init__(self, config: BigBirdViTConfig):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        # no parameter without registers: a sharded optimiser takes no empty ones
        self.register_tokens = None
        if config.num_register_tokens > 0:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        self.register_load_state_dict_pre_hook(_without_empty_registers)
        self.projection: nn.Conv2d | BigBirdViTConvStem
        if config.patch_embedding == "conv":
            self.projection = BigBirdViTConvStem(config)
        else:
            patch, stride = config.patch_size_hw, config.patch_stride_hw
            self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=stride)
        self.position_embeddings = None
        if config.position_embedding_type == "absolute":
            rows, columns = config.grid_size(*config.image_size_hw)
            self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + rows * columns, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: torch.Tensor,
        valid: torch.Tensor | None = None,
        masked_patches: torch.Tensor | None = None,
        mask_token: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return tokens `(batch, 1 + registers + patches, hidden_size)`, patches in raster order.

        Where `masked_patches` `(batch, patches)` says so, `mask_token` `(hidden_size,)` stands for the patch.
        """
        pixel_values = pixel_values.to(self.projection.weight.dtype)
        is_stem = isinstance(self.projection, BigBirdViTConvStem)
        projected = self.projection(pixel_values, valid) if is_stem else self.projection(pixel_values)
        rows, columns = projected.shape[-2:]
        patches: torch.Tensor = projected.flatten(2).transpose(1, 2)
        if masked_patches is not None and mask_token is not None:
            patches = torch.where(masked_patches[..., None], mask_token.to(patches.dtype), patches)
        cls: torch.Tensor = self.cls_token
        if self.position_embeddings is not None:
            native = self.config.grid_size(*self.config.image_size_hw)
            table = self.position_embeddings[0, 1:].unflatten(0, native)
            patches = patches + resampled_positions(table, valid, rows, columns, self.config.interpolate_antialias)
            cls = cls + self.position_embeddings[:, :1]
        prefix = [token.expand(patches.shape[0], -1, -1) for token in (cls, self.register_tokens) if token is not None]
        return self.dropout(torch.cat([*prefix, patches], dim=1))

    def valid_patches(self, pixel_mask: torch.Tensor) -> torch.Tensor:
        """Return `(batch, rows, columns)` bool from `(batch, height, width)`: true where any pixel is valid."""
        pooled = F.max_pool2d(
            pixel_mask[:, None].to(torch.float32), self.config.patch_size_hw, stride=self.config.patch_stride_hw
        )
        return pooled[:, 0] > 0


def _without_empty_registers(module, state_dict, prefix, *_) -> None:
    """Drop the empty tensor that weights of models without registers used to hold."""
    name = f"{prefix}register_tokens"
    if name in state_dict and state_dict[name].numel() == 0:
        del state_dict[name]


def layer_pattern(config: BigBirdViTConfig, rows: int, columns: int, layer: int = 0) -> BlockPattern:
    """Return the pattern that the configuration gives a layer on a grid of `rows` x `columns` patches."""
    return block_pattern(rows, columns, **pattern_settings(config, rows, columns), layer=layer)


class BigBirdViTPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation for every BigBirdViT model."""

    config: BigBirdViTConfig
    base_model_prefix = "bigbird_vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _input_embed_layer = "projection"
    _no_split_modules = ["BigBirdViTEmbeddings", "BigBirdViTLayer"]  # noqa: RUF012  transformers' own form
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": BigBirdViTLayer,
        "attentions": BigBirdViTAttention,
    }

    def __init__(self, config: BigBirdViTConfig, *arguments, **keywords):
        super().__init__(config, *arguments, **keywords)
        if self.loss_type is None:
            self._loss_function = None  # of a model without one, where transformers would warn of a language model's
        if config.num_register_tokens == 0:
            # earlier weights of such models hold an empty tensor
            self._keys_to_ignore_on_load_unexpected = [r"embeddings\.register_tokens$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, BigBirdViTEmbeddings):
            init.trunc_normal_(module.cls_token, mean=0.0, std=std)
            if module.register_tokens is not None:
                init.trunc_normal_(module.register_tokens, mean=0.0, std=std)
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, mean=0.0, std=std)
        elif isinstance(module, BigBirdViTLayerScale):
            init.constant_(module.lambda1, self.config.layerscale_value)


class BigBirdViTEncoder(BigBirdViTPreTrainedModel):
    """The stack of layers, on tokens in tile-major order."""

    def __init__(self, config: BigBirdViTConfig):
        super().__init__(config)
        self.layer = nn.ModuleList(BigBirdViTLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        patterns: tuple[BlockPattern, ...],
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        orders: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        for layer, pattern in zip(self.layer, patterns, strict=True):
            hidden_states = layer(hidden_states, attention_mask, pattern, rotary, orders, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class BigBirdViTPooler(nn.Module):
    """A linear layer and an activation on the pooled feature, as ViT has them."""

    def __init__(self, config: BigBirdViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(pooled))


class BigBirdViTModel(BigBirdViTPreTrainedModel):
    """The bare encoder: images in, tokens and a pooled feature out.

    Args:
        config: The architecture.
        add_pooling_layer: False leaves out the pooler that `config.pooler_act` asks for.
    """

    def __init__(self, config: BigBirdViTConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BigBirdViTEmbeddings(config)
        self.encoder = BigBirdViTEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = BigBirdViTPooler(config) if add_pooling_layer and config.pooler_act is not None else None
        self._patterns = PatternCache()
        self.post_init()

    def _apply(self, *arguments, **keywords):
        self._patterns.clear()  # their tables are on the device that the model leaves
        return super()._apply(*arguments, **keywords)

    @classmethod
    def from_dense(cls, source: str | os.PathLike | PreTrainedModel, **changes) -> "BigBirdViTModel":
        """Return a model with the weights of a dense ViT, DINOv2 or DINOv3, in evaluation mode.

        Attention is dense unless `changes` say otherwise, and the outputs equal the source's. Its mask token is left
        out. Sparse attention is a change of the configuration alone: `attention_type="block_sparse"`.

        Args:
            source: The model, or the folder or Hub id of one in safetensors form.
            changes: Fields of the configuration that leave the weights as they are: `attention_type`, `tile_size`,
                `pooling`, `drop_path_rate`, ...

        Raises:
            ValueError: Another kind of model, one with missing or unknown tensors, or a change that would need others.
            OSError: No model there.
        """
        return load_dense(cls, source, changes)

    def attention_patterns(self, height: int, width: int) -> list[BlockPattern]:
        """Return the pattern of every layer for an image of `height` x `width` pixels.

        Raises:
            ValueError: The image is smaller than one patch.
        """
        return list(self._fitting(height, width))

    def _fitting(self, height: int, width: int, given: list[BlockPattern] | None = None) -> tuple[BlockPattern, ...]:
        """Return the model's own patterns for an image, or those of a call if they fit in their place."""
        # `index`: the grid is a constant to torch.compile, whatever sizes came before
        rows, columns = (operator.index(side) for side in self.config.grid_size(height, width))
        settings, layers = pattern_settings(self.config, rows, columns), self.config.num_hidden_layers
        if given is None:
            return self._cached_patterns(rows, columns, layers, **settings)
        patterns, num_global = tuple([constant(one) for one in given]), settings["num_global_tokens"]
        found = [(one.grid, one.num_global_tokens) for one in patterns]
        if found != [((rows, columns), num_global)] * layers:
            raise ValueError(
                f"`attention_patterns`: expected {layers} patterns of grid {(rows, columns)} with {num_global} global "
                f"tokens, got {found}."
            )
        if len({one.order_name for one in patterns}) > 1:
            raise ValueError("`attention_patterns`: expected one order of patches in all layers, got different tiles.")
        return patterns

    @torch.compiler.assume_constant_result
    def _cached_patterns(self, rows: int, columns: int, layers: int, **settings) -> tuple[BlockPattern, ...]:
        def make() -> list[BlockPattern]:
            return [block_pattern(rows, columns, **settings, layer=layer) for layer in range(layers)]

        return self._patterns.get((rows, columns, layers, *settings.values()), make)

    def attention_pattern(self, height: int, width: int, layer: int = 0) -> BlockPattern:
        """Return the pattern of one layer for an image of `height` x `width` pixels; print it to see it.

        Raises:
            ValueError: The image is smaller than one patch, or there is no such layer.
        """
        if not 0 <= layer < self.config.num_hidden_layers:
            raise ValueError(f"`layer`: expected 0 to {self.config.num_hidden_layers - 1}, got {layer}.")
        return self._fitting(height, width)[layer]

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        attention_patterns: list[BlockPattern] | None = None,
        masked_patches: torch.Tensor | None = None,
        mask_token: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised as the image processor does.
            pixel_mask: `(batch, height, width)`, 1 for pixels of the image, 0 for padding. A patch is valid if any of
                its pixels is; other patches are seen by no token, and what is returned for them means nothing.
            attention_patterns: A pattern for each layer in place of the model's own, all in the same order of patches.
                With those of `visible_patterns` the layers run on some of the patches, and those alone are returned.
            masked_patches: `(batch, patches)` bool, the patches that `mask_token` stands for.
            mask_token: `(hidden_size,)`, what masked patches are before positions are added; both or none.
            kwargs: `output_hidden_states`, `return_dict`, and `output_attentions`, for which a call is computed by
                `eager` whatever the implementation.

        Returns:
            `last_hidden_state` `(batch, 1 + registers + patches, hidden_size)`, CLS and registers first and patches in
            raster order, and `pooler_output` `(batch, hidden_size)`.

        Raises:
            ValueError: No or wrongly shaped `pixel_values` or masks, or an image smaller than a patch.
            TypeError: A keyword that is none of these.
        """
        check_keywords(kwargs, ("pixel_values", "pixel_mask", "attention_patterns", "labels"))
        check_inputs(self.config, pixel_values, pixel_mask)
        assert pixel_values is not None  # for the type checker; checked above
        asked = {name: asks_for(name, self.config, kwargs) for name in ("hidden_states", "attentions")}
        if asked["attentions"]:
            warn_of_eager(self.config._attn_implementation)
        height, width = pixel_values.shape[-2:]
        patterns = self._fitting(height, width, attention_patterns)
        theta = self.config.rope_theta if self.config.position_embedding_type == "rope" else None
        positions = self.config.head_dim, theta, pixel_values.device
        plan = derived(patterns[0], grid_plan, *positions)
        kept, to_tiles, to_raster, rotary = plan
        num_global = 1 + self.config.num_register_tokens

        key_valid = shown = valid = None
        if pixel_mask is not None:
            valid = self.embeddings.valid_patches(pixel_mask)
            shown = reorder(F.pad(valid.flatten(1), (num_global, 0), value=True), kept, 1)
            key_valid = reorder(shown, to_tiles, 1)
            rotary = rotary_in_order(patterns[0], kept, to_tiles, valid, *positions)
        tokens = reorder(self.embeddings(pixel_values, valid, masked_patches, mask_token), kept, 1)
        if rotary is not None:
            rotary = rotary[0].to(tokens.dtype), rotary[1].to(tokens.dtype)
        # what is recorded is what the next layer reads, so that its gradient can be asked for: then layers permute
        orders = (to_tiles, to_raster) if any(asked.values()) and to_tiles is not None else None
        tokens = reorder(tokens, None if orders else to_tiles, 1)
        flags = kwargs | {"return_dict": True, "output_attentions": asked["attentions"]}
        encoded = self.encoder(tokens, key_valid, patterns, rotary, orders, **flags)

        # layers may lie on other devices than the images
        device = encoded.last_hidden_state.device
        shown = None if shown is None else shown[:, num_global:].to(device)
        back = None if orders or to_raster is None else to_raster.to(device)
        last_hidden_state = self.layernorm(reorder(encoded.last_hidden_state, back, 1))
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=self._pool(last_hidden_state[:, :1], last_hidden_state[:, num_global:], shown),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _pool(self, cls: torch.Tensor, patches: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        pooled = self._pooled_token(cls, patches, valid)
        return pooled if self.pooler is None else self.pooler(pooled)

    def _pooled_token(self, cls: torch.Tensor, patches: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        if self.config.pooling == "cls":
            return cls[:, 0]
        if valid is None:
            return patches.mean(1)
        dtype = torch.promote_types(patches.dtype, torch.float32)  # sums over thousands of patches overflow a half
        weights = valid.flatten(1).to(dtype)
        mean = (patches.to(dtype) * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
        return mean.to(patches.dtype)


class BigBirdViTForImageClassification(BigBirdViTPreTrainedModel):
    """The encoder and a linear layer on its pooled feature."""

    def __init__(self, config: BigBirdViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bigbird_vit = BigBirdViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            pixel_mask: `(batch, height, width)`, as for `BigBirdViTModel`.
            labels: `(batch,)` integers from 0 to `num_labels - 1`, or -100 for images without a label. Floats
                `(batch, num_labels)` are targets of several labels an image; with one label, `(batch,)` numbers are a
                regression's. `config.problem_type` decides where it is set.
            kwargs: As for `BigBirdViTModel`.

        Returns:
            `logits` `(batch, num_labels)` and, with `labels`, the scalar `loss`.

        Raises:
            ValueError: Labels of another shape or type, or out of range, and what `BigBirdViTModel` refuses.
        """
        problem = None if labels is None else label_problem(labels, pixel_values, self.config)
        outputs = self.bigbird_vit(pixel_values, pixel_mask, **kwargs | {"return_dict": True})
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None and problem is not None:
            targets = labels.long() if problem.problem_type == CLASSES else labels.to(logits.dtype)
            loss = self.loss_function(targets, logits, problem, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    @classmethod
    def from_dense(cls, source: str | os.PathLike | PreTrainedModel, **changes) -> "BigBirdViTForImageClassification":
        """Return a classifier with the weights of a dense ViT's; see `BigBirdViTModel.from_dense`.

        DINOv2's classifiers, which read the CLS token and the mean of the patches, do not fit.
        """
        return load_dense(cls, source, changes, AutoModelForImageClassification)


class BigBirdViTBackbone(BackboneMixin, BigBirdViTModel):
    """The encoder as a backbone: feature maps of the stages named in the configuration, for DETR, DPT or UperNet."""

    def __init__(self, config: BigBirdViTConfig):
        super().__init__(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BackboneOutput:
        """Return feature maps.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            pixel_mask: `(batch, height, width)`, as for `BigBirdViTModel`.
            kwargs: As for `BigBirdViTModel`.

        Returns:
            `feature_maps`, one for each of `out_features`: `(batch, hidden_size, rows, columns)`, patches where they
            are in the image. With `reshape_hidden_states=False`, `(batch, 1 + patches, hidden_size)`, CLS first and
            no registers, which is what DPT expects.

        Raises:
            ValueError: What `BigBirdViTModel` refuses.
        """
        # not `super()`: the mixin comes first and has a `forward` of its own, which raises
        outputs = BigBirdViTModel.forward(self, pixel_values, pixel_mask, **kwargs | {"return_dict": True})
        assert pixel_values is not None  # for the type checker; checked above
        maps = [
            state
            for name, state in zip(self.stage_names, outputs.hidden_states, strict=True)
            if name in self.out_features
        ]
        if self.config.apply_layernorm:
            maps = [self.layernorm(one) for one in maps]
        first = 1 + self.config.num_register_tokens
        if self.config.reshape_hidden_states:
            grid = self.config.grid_size(*pixel_values.shape[-2:])
            maps = [one[:, first:].transpose(1, 2).unflatten(2, grid).contiguous() for one in maps]
        else:
            maps = [torch.cat([one[:, :1], one[:, first:]], dim=1) for one in maps]
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "IMPLEMENTATIONS",
    "BigBirdViTBackbone",
    "BigBirdViTForImageClassification",
    "BigBirdViTModel",
    "BigBirdViTPreTrainedModel",
]
