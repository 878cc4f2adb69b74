"""BigBird vision transformer: a ViT whose patches attend globally, locally and at random.

The layers work on tokens in tile-major order (see `bigbird_pattern.py`). Tokens are permuted once before the first
layer and put back once after the last: everything a caller sees is in raster order, CLS and registers first.
"""

import math
import operator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .bigbird_attention import eager_attention, flex_attention, sdpa_attention
from .bigbird_pattern import BlockPattern, block_pattern, cached_tables, named_pattern
from .block_sparse_attention import NAMESPACE
from .configuration_bigbird_vit import BigBirdViTConfig

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
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size_hw, stride=config.patch_stride_hw
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        """Return tokens `(batch, 1 + registers + patches, hidden_size)`, patches in `order` (raster if None)."""
        patches = self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)
        if order is not None:
            patches = patches.index_select(1, order)
        batch = patches.shape[0]
        prefix = [self.cls_token.expand(batch, -1, -1), self.register_tokens.expand(batch, -1, -1)]
        return self.dropout(torch.cat([*prefix, patches], dim=1))

    def valid_patches(self, pixel_mask: torch.Tensor) -> torch.Tensor:
        """Return `(batch, rows, columns)` bool from `(batch, height, width)`: true where any pixel is valid."""
        pooled = F.max_pool2d(
            pixel_mask[:, None].to(torch.float32), self.config.patch_size_hw, stride=self.config.patch_stride_hw
        )
        return pooled[:, 0] > 0


def rotary_tables(config: BigBirdViTConfig, valid: torch.Tensor | None, rows: int, columns: int, device: torch.device):
    """Return cosines and sines of the rotary positions.

    Coordinates are patch centres scaled to (-1, 1) over the image, or over each image's valid area when some patches
    are padding. The first half of the frequencies turns with the row, the second with the column.

    Source: Siméoni et al. 2025, DINOv3 (arXiv 2508.10104), section 3.2: axial RoPE on normalised coordinates. Without
    the training-time jitter of coordinates.

    Args:
        config: Gives the head size and the base.
        valid: `(batch, rows, columns)` bool, or None when every patch is valid.
        rows: Rows of patches.
        columns: Columns of patches.
        device: Where to put the tables.

    Returns:
        Two float32 tensors `(batch or 1, 1, patches, head_dim)`, patches in raster order.
    """
    num_frequencies = config.head_dim // 4
    exponents = torch.arange(num_frequencies, dtype=torch.float32, device=device) / num_frequencies
    frequencies = 2 * math.pi * config.rope_theta**-exponents
    row_angles = _coordinates(None if valid is None else valid.any(2), rows, device)[..., None] * frequencies
    column_angles = _coordinates(None if valid is None else valid.any(1), columns, device)[..., None] * frequencies
    angles = torch.cat(
        [
            row_angles[:, :, None].expand(-1, -1, columns, -1),
            column_angles[:, None].expand(-1, rows, -1, -1),
        ],
        dim=-1,
    ).flatten(1, 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def _coordinates(valid: torch.Tensor | None, count: int, device: torch.device) -> torch.Tensor:
    """`(batch or 1, count)` centres of rows or columns, from -1 to 1 over those that hold a valid patch."""
    lines = torch.arange(count, dtype=torch.float32, device=device)[None]
    if valid is None:
        return 2 * (lines + 0.5) / count - 1
    first = lines.where(valid, float(count)).amin(1, keepdim=True)
    end = (lines + 1).where(valid, 0.0).amax(1, keepdim=True)
    # an image of padding alone has extent 1
    return 2 * (lines + 0.5 - first) / (end - first).clamp(min=1) - 1


def with_global_tokens(
    tables: tuple[torch.Tensor, torch.Tensor], num_global: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rotary tables with `num_global` tokens in front that no rotation moves: cosine 1, sine 0."""
    cos, sin = tables
    return F.pad(cos, (0, 0, num_global, 0), value=1.0), F.pad(sin, (0, 0, num_global, 0))


def rotate(tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return `(batch, heads, tokens, head_dim)` rotated by tables `(batch or 1, 1, tokens, head_dim)`.

    Under autocast the tables are fp32 and the tokens are not: the result has the tokens' type.
    """
    first, second = tokens.chunk(2, dim=-1)
    return (tokens * cos + torch.cat([-second, first], dim=-1) * sin).to(tokens.dtype)


def layer_pattern(config: BigBirdViTConfig, rows: int, columns: int, layer: int = 0) -> BlockPattern:
    """Return the pattern that the configuration gives a layer on a grid of `rows` x `columns` patches, cached."""
    full = config.attention_type == "original_full"
    return block_pattern(
        rows,
        columns,
        layout="tiles" if full else config.attention_layout,
        tile_size=(rows, columns) if full else config.tile_size_hw,
        block_size=config.block_size,
        window_size=config.window_size,
        num_random_blocks=0 if full else config.num_random_blocks,
        num_global_tiles=0 if full else config.num_global_tiles,
        num_global_tokens=1 + config.num_register_tokens,
        seed=config.attention_seed,
        layer=0 if full else layer,
    )


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
        rotary: tuple[torch.Tensor, torch.Tensor],
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `(batch, tokens, hidden_size)` and, from `eager`, probabilities `(batch, heads, tokens, tokens)`."""
        batch, tokens, _ = hidden_states.shape

        def heads(projection: nn.Linear) -> torch.Tensor:
            return projection(hidden_states).view(batch, tokens, -1, self.head_dim).transpose(1, 2)

        query, key, value = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if self.config._attn_implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"`attn_implementation`: expected one of {IMPLEMENTATIONS}, got {self.config._attn_implementation!r}; "
                "other implementations would ignore the block pattern."
            )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, probabilities = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            pattern=pattern,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
        )
        return self.o_proj(output.reshape(batch, tokens, -1)), probabilities


class BigBirdViTMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: BigBirdViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class BigBirdViTLayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, config: BigBirdViTConfig):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), float(config.layerscale_value or 0)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.lambda1


class BigBirdViTDropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples (Huang et al. 2016, arXiv 1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return hidden_states
        keep = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) >= self.rate
        return hidden_states * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class BigBirdViTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config: BigBirdViTConfig, layer_index: int):
        super().__init__()
        scaled = config.layerscale_value is not None
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = BigBirdViTAttention(config)
        self.layer_scale1 = BigBirdViTLayerScale(config) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = BigBirdViTMLP(config)
        self.layer_scale2 = BigBirdViTLayerScale(config) if scaled else nn.Identity()
        self.drop_path = BigBirdViTDropPath(config.drop_path_rate * layer_index / max(1, config.num_hidden_layers - 1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pattern: BlockPattern,
        rotary: tuple[torch.Tensor, torch.Tensor],
        **kwargs,
    ) -> torch.Tensor:
        attended, _ = self.attention(self.norm1(hidden_states), attention_mask, pattern, rotary, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(attended))
        return hidden_states + self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states))))


class BigBirdViTPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation for every BigBirdViT model."""

    config: BigBirdViTConfig
    base_model_prefix = "bigbird_vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["BigBirdViTEmbeddings", "BigBirdViTLayer"]  # noqa: RUF012  transformers' own form
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": BigBirdViTLayer,
        "attentions": BigBirdViTAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, BigBirdViTEmbeddings):
            init.trunc_normal_(module.cls_token, mean=0.0, std=std)
            init.trunc_normal_(module.register_tokens, mean=0.0, std=std)
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
        patterns: list[BlockPattern],
        rotary: tuple[torch.Tensor, torch.Tensor],
        **kwargs,
    ) -> BaseModelOutput:
        for layer, pattern in zip(self.layer, patterns, strict=True):
            hidden_states = layer(hidden_states, attention_mask, pattern, rotary, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class BigBirdViTModel(BigBirdViTPreTrainedModel):
    """The bare encoder: images in, tokens and a pooled feature out."""

    def __init__(self, config: BigBirdViTConfig):
        super().__init__(config)
        self.embeddings = BigBirdViTEmbeddings(config)
        self.encoder = BigBirdViTEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def attention_patterns(self, height: int, width: int) -> list[BlockPattern]:
        """Return the pattern of every layer for an image of `height` x `width` pixels.

        Raises:
            ValueError: The image is smaller than one patch.
        """
        # `index`: the grid is a constant to torch.compile, whatever sizes came before
        rows, columns = (operator.index(side) for side in self.config.grid_size(height, width))
        return [layer_pattern(self.config, rows, columns, layer) for layer in range(self.config.num_hidden_layers)]

    def attention_pattern(self, height: int, width: int, layer: int = 0) -> BlockPattern:
        """Return the pattern of one layer for an image of `height` x `width` pixels; print it to see it.

        Raises:
            ValueError: The image is smaller than one patch, or there is no such layer.
        """
        if not 0 <= layer < self.config.num_hidden_layers:
            raise ValueError(f"`layer`: expected 0 to {self.config.num_hidden_layers - 1}, got {layer}.")
        rows, columns = self.config.grid_size(height, width)
        return layer_pattern(self.config, rows, columns, layer)

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
            kwargs: `output_hidden_states`, `output_attentions` (with `attn_implementation="eager"`), `return_dict`.

        Returns:
            `last_hidden_state` `(batch, 1 + registers + patches, hidden_size)`, CLS and registers first and patches in
            raster order, and `pooler_output` `(batch, hidden_size)`.

        Raises:
            ValueError: No or wrongly shaped `pixel_values` or `pixel_mask`, an image smaller than a patch, or
                `output_attentions` with an implementation that has no probabilities.
        """
        self._check_inputs(pixel_values, pixel_mask, kwargs)
        assert pixel_values is not None  # for the type checker; checked above
        height, width = pixel_values.shape[-2:]
        rows, columns = self.config.grid_size(height, width)
        if attention_patterns is None:
            patterns = self.attention_patterns(height, width)
        else:
            patterns = attention_patterns
            self._check_patterns(patterns, (rows, columns))
        # all layers of a grid share one order; a grid where it is raster order needs no permutation
        order = None if _is_raster(patterns[0].name) else patch_order(patterns[0], pixel_values.device)
        num_global = patterns[0].num_global_tokens

        valid = None if pixel_mask is None else self.embeddings.valid_patches(pixel_mask)
        cos, sin = rotary_tables(self.config, valid, rows, columns, pixel_values.device)
        key_valid = None if valid is None else valid.flatten(1)
        if order is not None:
            cos, sin = cos.index_select(2, order), sin.index_select(2, order)
            key_valid = None if key_valid is None else key_valid.index_select(1, order)
        if key_valid is not None:
            key_valid = F.pad(key_valid, (num_global, 0), value=True)

        tokens = self.embeddings(pixel_values, order)
        rotary = with_global_tokens((cos.to(tokens.dtype), sin.to(tokens.dtype)), num_global)
        encoded = self.encoder(tokens, key_valid, patterns, rotary, **kwargs | {"return_dict": True})

        to_raster = None
        if order is not None:
            to_raster = torch.cat([torch.arange(num_global, device=order.device), order.argsort() + num_global])
        last_hidden_state = self.layernorm(_reorder(encoded.last_hidden_state, to_raster, 1))
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=self._pool(last_hidden_state[:, :1], last_hidden_state[:, num_global:], valid),
            hidden_states=encoded.hidden_states
            and tuple(state if state is None else _reorder(state, to_raster, 1) for state in encoded.hidden_states),
            attentions=encoded.attentions
            and tuple(_reorder(_reorder(one, to_raster, 2), to_raster, 3) for one in encoded.attentions),
        )

    def _pool(self, cls: torch.Tensor, patches: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        if self.config.pooling == "cls":
            return cls[:, 0]
        if valid is None:
            return patches.mean(1)
        dtype = torch.promote_types(patches.dtype, torch.float32)  # sums over thousands of patches overflow a half
        weights = valid.flatten(1).to(dtype)
        mean = (patches.to(dtype) * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
        return mean.to(patches.dtype)

    def _check_patterns(self, patterns: list[BlockPattern], grid: tuple[int, int]) -> None:
        rows, columns = (operator.index(side) for side in grid)
        names = "/".join([one.name for one in patterns])
        misfit = _misfit(names, self.config.num_hidden_layers, rows, columns, 1 + self.config.num_register_tokens)
        if misfit:
            raise ValueError(f"`attention_patterns`: expected {misfit}.")

    def _check_inputs(self, pixel_values, pixel_mask, kwargs) -> None:
        if pixel_values is None:
            raise ValueError("`pixel_values`: expected a tensor (batch, channels, height, width), got None.")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"`pixel_values`: expected (batch, {self.config.num_channels} channels, height, width), "
                f"got {tuple(pixel_values.shape)}."
            )
        if pixel_mask is None:
            pass
        elif not isinstance(pixel_mask, torch.Tensor) or pixel_mask.dtype.is_complex:
            found = getattr(pixel_mask, "dtype", type(pixel_mask).__name__)
            raise ValueError(f"`pixel_mask`: expected a tensor of bool, integers or floats, got {found}.")
        elif pixel_mask.shape != (pixel_values.shape[0], *pixel_values.shape[2:]):
            raise ValueError(
                "`pixel_mask`: expected (batch, height, width) "
                f"{(pixel_values.shape[0], *pixel_values.shape[2:])}, got {tuple(pixel_mask.shape)}."
            )
        if (
            self.config.output_attentions if kwargs.get("output_attentions") is None else kwargs["output_attentions"]
        ) and self.config._attn_implementation != "eager":
            raise ValueError(
                "`output_attentions`: expected `attn_implementation='eager'`, the only one with probabilities, got "
                f"{self.config._attn_implementation!r}; call `model.set_attn_implementation('eager')`."
            )


@torch.compiler.assume_constant_result
def _misfit(names: str, layers: int, rows: int, columns: int, num_global: int) -> str:
    """What was expected of a model's patterns and what they are; empty if they fit. Names are joined by slashes."""
    patterns = [named_pattern(name) for name in names.split("/")] if names else []
    found = [(one.grid, one.num_global_tokens) for one in patterns]
    if found != [((rows, columns), num_global)] * layers:
        return f"{layers} patterns of grid {(rows, columns)} with {num_global} global tokens, got {found}"
    if not all(torch.equal(patterns[0].order, one.order) for one in patterns[1:]):
        return "one order of patches in all layers, got different tiles"
    return ""


@torch.compiler.assume_constant_result
def _is_raster(name: str) -> bool:
    return named_pattern(name).is_raster


def patch_order(pattern: BlockPattern, device: torch.device) -> torch.Tensor:
    """Return the pattern's `order` on the device."""
    if torch.compiler.is_compiling():
        return _patch_order(pattern.name, device)
    return _cached_order(pattern, device)


@torch.library.custom_op(f"{NAMESPACE}::patch_order", mutates_args=())
def _patch_order(name: str, device: torch.device) -> torch.Tensor:
    return _cached_order(named_pattern(name), device).clone()  # a compiler may write over what an operator returns


@_patch_order.register_fake
def _patch_order_fake(name, device):
    return torch.empty(len(named_pattern(name).order), dtype=torch.int64, device=device)


@cached_tables(maxsize=64)
def _cached_order(pattern: BlockPattern, device: torch.device) -> torch.Tensor:
    return pattern.order.to(device)


def _reorder(states: torch.Tensor, index: torch.Tensor | None, dim: int) -> torch.Tensor:
    return states if index is None else states.index_select(dim, index)


__all__ = ["BigBirdViTModel", "BigBirdViTPreTrainedModel"]
