"""The transformer layer: attention over a block pattern, MLP, plain or gated, layer scale and stochastic depth."""

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .bigbird_attention import eager_attention, flex_attention, sdpa_attention
from .bigbird_positions import rotate
from .configuration_bigbird_vit import BigBirdViTConfig
from .grid_plan import reorder
from .pattern_tables import BlockPattern

# A registry of this module alone: the entries upstream know nothing of a block pattern and would attend densely.
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention
ALL_ATTENTION_FUNCTIONS["flex_attention"] = flex_attention


class BigBirdViTMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: BigBirdViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class BigBirdViTSwiGLU(nn.Module):
    """Gated MLP: a linear layer times an activation, SiLU by default, of another, and a linear layer back."""

    def __init__(self, config: BigBirdViTConfig):
        super().__init__()
        self.activation = ACT2FN[config.gate_act]
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


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


class BigBirdViTAttention(nn.Module):
    """Multi-head attention over a block pattern."""

    def __init__(self, config: BigBirdViTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias and config.key_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        # by grid, what `sdpa` takes in place of its rule; see `attention_timing.py`
        self.attention_forms: dict[tuple[int, int], str] = {}

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


__all__ = [
    "IMPLEMENTATIONS",
    "BigBirdViTAttention",
    "BigBirdViTDropPath",
    "BigBirdViTLayer",
    "BigBirdViTLayerScale",
    "BigBirdViTMLP",
    "BigBirdViTSwiGLU",
]
