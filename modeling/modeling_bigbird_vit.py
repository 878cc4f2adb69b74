"""BigBird vision transformer: a ViT whose patches attend globally, locally and at random.

The layers work on tokens in tile-major order (see `bigbird_pattern.py`). Tokens are permuted once before the first
layer and put back once after the last: everything a caller sees is in raster order, CLS and registers first.
"""

import operator
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AutoModelForImageClassification, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .bigbird_attention import eager_attention, flex_attention, sdpa_attention
from .bigbird_blocks import BigBirdViTDropPath, BigBirdViTLayerScale, BigBirdViTMLP, BigBirdViTSwiGLU
from .bigbird_pattern import BlockPattern, block_pattern, constant, derived
from .bigbird_positions import resampled_positions, rotate
from .call_checks import asks_for, check_inputs, check_keywords, warn_of_eager
from .configuration_bigbird_vit import BigBirdViTConfig
from .dense_weights import load_dense
from .grid_plan import PatternCache, grid_plan, reorder, rotary_in_order

# A registry of this module alone: the entries upstream know nothing of a block pattern and would attend densely.
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention
ALL_ATTENTION_FUNCTIONS["flex_attention"] = flex_attention


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
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size_hw, stride=config.patch_stride_hw
        )
        self.position_embeddings = None
        if config.position_embedding_type == "absolute":
            rows, columns = config.grid_size(*config.image_size_hw)
            self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + rows * columns, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Return tokens `(batch, 1 + registers + patches, hidden_size)`, patches in raster order."""
        projected = self.projection(pixel_values.to(self.projection.weight.dtype))
        rows, columns = projected.shape[-2:]
        patches: torch.Tensor = projected.flatten(2).transpose(1, 2)
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
    return block_pattern(rows, columns, **_pattern_settings(config, rows, columns), layer=layer)


def _pattern_settings(config: BigBirdViTConfig, rows: int, columns: int) -> dict[str, Any]:
    """What `block_pattern` takes beside the grid and the layer."""
    full = config.attention_type == "original_full"
    return {
        "layout": "tiles" if full else config.attention_layout,
        "tile_size": (rows, columns) if full else config.tile_size_hw,
        "block_size": config.block_size,
        "window_size": config.window_size,
        "num_random_blocks": 0 if full else config.num_random_blocks,
        "num_global_tiles": 0 if full else config.num_global_tiles,
        "num_global_tokens": 1 + config.num_register_tokens,
        "seed": config.attention_seed,
    }


class BigBirdViTAttention(nn.Module):
    """Multi-head attention over a block pattern."""

    def __init__(self, config: BigBirdViTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pattern: BlockPattern,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        orders: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `(batch, tokens, hidden_size)` and probabilities `(batch, heads, tokens, tokens)`, or None.

        Probabilities come from `eager`, which `output_attentions` asks for; with `orders`, to tiles and back, they are
        in raster order. The rest is in tile-major order.
        """
        batch, tokens, _ = hidden_states.shape

        def heads(projection: nn.Linear) -> torch.Tensor:
            return projection(hidden_states).view(batch, tokens, -1, self.head_dim).transpose(1, 2)

        query, key, value = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if self.config._attn_implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"`attn_implementation`: expected one of {IMPLEMENTATIONS}, got {self.config._attn_implementation!r}; "
                "other implementations would ignore the block pattern."
            )
        # only `eager` has probabilities
        name = "eager" if kwargs.get("output_attentions") else self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        output, probabilities = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            pattern=pattern,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            orders=orders,
        )
        return self.o_proj(output.reshape(batch, tokens, -1)), probabilities


class BigBirdViTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config: BigBirdViTConfig, layer_index: int):
        super().__init__()
        scaled = config.layerscale_value is not None
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = BigBirdViTAttention(config)
        self.layer_scale1 = BigBirdViTLayerScale(config) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = (BigBirdViTSwiGLU if config.use_swiglu_ffn else BigBirdViTMLP)(config)
        self.layer_scale2 = BigBirdViTLayerScale(config) if scaled else nn.Identity()
        self.drop_path = BigBirdViTDropPath(config.drop_path_rate * layer_index / max(1, config.num_hidden_layers - 1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pattern: BlockPattern,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        orders: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Return the next layer's states; with `orders`, to tiles and back, they come and go in raster order."""
        to_tiles, to_raster = orders or (None, None)
        hidden_states = reorder(hidden_states, to_tiles, 1)
        attended, _ = self.attention(self.norm1(hidden_states), attention_mask, pattern, rotary, orders, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(attended))
        hidden_states = hidden_states + self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states))))
        return reorder(hidden_states, to_raster, 1)


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
        """Return a model with the weights of a dense ViT or DINOv2 (with or without registers), in evaluation mode.

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
        return list(self._own_patterns(height, width))

    def _own_patterns(self, height: int, width: int) -> tuple[BlockPattern, ...]:
        # `index`: the grid is a constant to torch.compile, whatever sizes came before
        rows, columns = (operator.index(side) for side in self.config.grid_size(height, width))
        settings = _pattern_settings(self.config, rows, columns)
        return self._cached_patterns(rows, columns, self.config.num_hidden_layers, **settings)

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
        return self._own_patterns(height, width)[layer]

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        attention_patterns: list[BlockPattern] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised as the image processor does.
            pixel_mask: `(batch, height, width)`, 1 for pixels of the image, 0 for padding. A patch is valid if any of
                its pixels is; other patches are seen by no token, and what is returned for them means nothing.
            attention_patterns: A pattern for each layer in place of the model's own, all in the same order of patches.
            kwargs: `output_hidden_states`, `return_dict`, and `output_attentions`, for which a call is computed by
                `eager` whatever the implementation.

        Returns:
            `last_hidden_state` `(batch, 1 + registers + patches, hidden_size)`, CLS and registers first and patches in
            raster order, and `pooler_output` `(batch, hidden_size)`.

        Raises:
            ValueError: No or wrongly shaped `pixel_values` or `pixel_mask`, or an image smaller than a patch.
            TypeError: A keyword that is none of these.
        """
        check_keywords(kwargs, ("pixel_values", "pixel_mask", "attention_patterns", "labels"))
        check_inputs(self.config, pixel_values, pixel_mask)
        assert pixel_values is not None  # for the type checker; checked above
        asked = {name: asks_for(name, self.config, kwargs) for name in ("hidden_states", "attentions")}
        if asked["attentions"]:
            warn_of_eager(self.config._attn_implementation)
        own = self._own_patterns(*pixel_values.shape[-2:])
        patterns = own if attention_patterns is None else self._fitting(attention_patterns, own[0])
        theta = self.config.rope_theta if self.config.position_embedding_type == "rope" else None
        positions = self.config.head_dim, theta, pixel_values.device
        to_tiles, to_raster, rotary = derived(patterns[0], grid_plan, *positions)
        num_global = 1 + self.config.num_register_tokens

        key_valid = valid = None
        if pixel_mask is not None:
            valid = self.embeddings.valid_patches(pixel_mask)
            key_valid = reorder(F.pad(valid.flatten(1), (num_global, 0), value=True), to_tiles, 1)
            rotary = rotary_in_order(patterns[0], to_tiles, valid, *positions)
        tokens = self.embeddings(pixel_values, valid)
        if rotary is not None:
            rotary = rotary[0].to(tokens.dtype), rotary[1].to(tokens.dtype)
        # what is recorded is what the next layer reads, so that its gradient can be asked for: then layers permute
        orders = (to_tiles, to_raster) if any(asked.values()) and to_tiles is not None else None
        tokens = reorder(tokens, None if orders else to_tiles, 1)
        flags = kwargs | {"return_dict": True, "output_attentions": asked["attentions"]}
        encoded = self.encoder(tokens, key_valid, patterns, rotary, orders, **flags)

        # layers may lie on other devices than the images
        device = encoded.last_hidden_state.device
        valid = None if valid is None else valid.to(device)
        back = None if orders or to_raster is None else to_raster.to(device)
        last_hidden_state = self.layernorm(reorder(encoded.last_hidden_state, back, 1))
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=self._pool(last_hidden_state[:, :1], last_hidden_state[:, num_global:], valid),
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

    def _fitting(self, given: list[BlockPattern], own: BlockPattern) -> tuple[BlockPattern, ...]:
        """Return the patterns that a call gives, if they fit where the model's own would stand."""
        patterns = tuple([constant(one) for one in given])
        layers, wanted = self.config.num_hidden_layers, (own.grid, own.num_global_tokens)
        found = [(one.grid, one.num_global_tokens) for one in patterns]
        if found != [wanted] * layers:
            raise ValueError(
                f"`attention_patterns`: expected {layers} patterns of grid {wanted[0]} with {wanted[1]} global "
                f"tokens, got {found}."
            )
        if len({one.order_name for one in patterns}) > 1:
            raise ValueError("`attention_patterns`: expected one order of patches in all layers, got different tiles.")
        return patterns


CLASSES = "single_label_classification"


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
        problem = None if labels is None else self._problem(labels, pixel_values)
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

    def _problem(self, labels: torch.Tensor, pixel_values: torch.Tensor | None) -> "_Problem":
        """Return what kind of loss the labels ask for, and check that they fit.

        transformers' loss would write the kind it infers into the configuration, and torch.compile compile again. Only
        several labels an image are written, since pipelines read it, and not by a compiled model. Neither does that
        compare labels with their number: a compiler cannot look at values.
        """
        if not isinstance(labels, torch.Tensor):
            raise ValueError(f"`labels`: expected a tensor, got {type(labels).__name__}.")
        given, batch = self.config.problem_type, len(labels) if pixel_values is None else len(pixel_values)
        integers = CLASSES if not labels.is_floating_point() else "multi_label_classification"
        kind = given or ("regression" if self.num_labels == 1 else integers)
        wide = kind == "multi_label_classification" or (kind == "regression" and self.num_labels > 1)
        shapes = [(batch, self.num_labels)] if wide else [(batch,), (batch, 1)]
        if tuple(labels.shape) not in shapes or (kind == CLASSES and labels.is_floating_point()):
            wanted = "integers (batch,)" if kind == CLASSES else f"numbers {shapes[0]}"
            raise ValueError(
                f"`labels`: expected {wanted} for problem type {kind!r}, got {labels.dtype} {tuple(labels.shape)} for "
                f"{batch} images; integers (batch,) are classes, floats (batch, num_labels) several labels an image."
            )
        if torch.compiler.is_compiling():
            return _Problem(self.num_labels, kind)
        if kind == CLASSES:
            wrong = labels[((labels < 0) & (labels != -100)) | (labels >= self.num_labels)]
            if len(wrong):
                raise ValueError(
                    f"`labels`: expected 0 to {self.num_labels - 1} (`num_labels` is {self.num_labels}), or -100 for "
                    f"no label, got {wrong[0].item()}."
                )
        elif wide:
            self.config.problem_type = kind
        return _Problem(self.num_labels, kind)


class _Problem(NamedTuple):
    """What transformers' loss reads of a configuration."""

    num_labels: int
    problem_type: str


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
    "BigBirdViTBackbone",
    "BigBirdViTForImageClassification",
    "BigBirdViTModel",
    "BigBirdViTPreTrainedModel",
]
