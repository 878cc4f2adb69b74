"""What attention costs at an image size, dense and by blocks: counted, not timed.

A multiplication and an addition are two FLOPs; softmax, norms and activations are left out. In the backward pass
fused attention computes the scores again: five products of matrices where the forward pass has two. Memory is what the
forward pass of one image keeps for its backward pass, read off the real layer, run on fake tensors: shapes without
numbers.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_vicreg.modeling.attention_timing import time_forms
from hf_vicreg.modeling.bigbird_attention import prefers_blocks
from hf_vicreg.modeling.bigbird_pattern import BlockPattern, block_pattern
from hf_vicreg.modeling.bigbird_positions import rotary_tables, with_global_tokens
from hf_vicreg.modeling.block_sparse_attention import block_sparse_attention
from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
from hf_vicreg.modeling.dense_attention import dense_attention
from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTLayer, BigBirdViTModel, layer_pattern

MAX_TILES = 4096  # tables of more take minutes


@dataclass(frozen=True)
class Cost:
    """FLOPs and memory of one layer for one image.

    Attributes:
        forward: FLOPs of the forward pass.
        training: FLOPs of the forward and the backward pass.
        kept: Bytes kept for the backward pass, in fp32.
    """

    forward: int
    training: int
    kept: int


@dataclass(frozen=True)
class AttentionCost:
    """Costs of a model's attention at one image size.

    Attributes:
        pattern: The first layer's pattern.
        core: Queries, keys and values to output; by `"dense"` and `"sparse"`.
        layer: The whole transformer layer, projections and MLP included; by `"dense"` and `"sparse"`.
        mask: Bytes of the mask of dense attention, shared by the images of a batch; 0 for a full pattern.
        uses_blocks: Whether `sdpa` on a CPU computes blocks at this size.
        blocks_from: About the side in pixels of the smallest square image at which it does; None if there is none of
            up to 32x32 tiles.
    """

    pattern: BlockPattern
    core: dict[str, Cost]
    layer: dict[str, Cost]
    mask: int
    uses_blocks: bool
    blocks_from: int | None


def attention_cost(config: BigBirdViTConfig, height: int, width: int) -> AttentionCost:
    """Return what attention costs for an image of `height` x `width` pixels.

    Raises:
        ValueError: The image is smaller than a patch, or has more than `MAX_TILES` tiles.
    """
    rows, columns = check_size(config, height, width)
    pattern = layer_pattern(config, rows, columns)
    full = block_pattern(
        rows, columns, tile_size=(rows, columns), num_random_blocks=0, num_global_tokens=pattern.num_global_tokens
    )
    tokens, hidden = pattern.num_tokens, config.hidden_size
    kept = {"dense": _kept(config, full, dense_attention), "sparse": _kept(config, pattern, block_sparse_attention)}
    others = _kept(config, full, None) - kept["dense"]
    mlp = 2 * (3 if config.use_swiglu_ffn else 2) * tokens * hidden * config.intermediate_size
    projections = 8 * tokens * hidden**2 + mlp
    core, layer = {}, {}
    for name, pairs in (("dense", tokens**2), ("sparse", round(pattern.density * tokens**2))):
        core[name] = Cost(4 * pairs * hidden, 14 * pairs * hidden, kept[name])
        layer[name] = Cost(
            core[name].forward + projections, core[name].training + 3 * projections, kept[name] + others
        )
    return AttentionCost(
        pattern=pattern,
        core=core,
        layer=layer,
        mask=0 if pattern.is_full else 4 * tokens**2 * len(pattern.neighbours),
        uses_blocks=prefers_blocks(pattern),
        blocks_from=_blocks_from(config),
    )


def check_size(config: BigBirdViTConfig, height: int, width: int) -> tuple[int, int]:
    """Return the grid of patches of an image.

    Raises:
        ValueError: The image is smaller than a patch, or has more than `MAX_TILES` tiles.
    """
    rows, columns = config.grid_size(height, width)
    if _num_tiles(config, rows, columns) > MAX_TILES:
        raise ValueError(
            f"`height`, `width`: expected at most {MAX_TILES} tiles, got {_num_tiles(config, rows, columns)} from "
            f"{height}x{width} pixels; choose larger tiles or a smaller image."
        )
    return rows, columns


def _num_tiles(config: BigBirdViTConfig, rows: int, columns: int) -> int:
    if config.attention_type == "original_full":
        return 1
    if config.attention_layout == "raster":
        return -(-rows * columns // config.block_size)
    return -(-rows // config.tile_size_hw[0]) * -(-columns // config.tile_size_hw[1])


def _blocks_from(config: BigBirdViTConfig) -> int | None:
    if config.attention_type == "original_full":
        return None
    raster = config.attention_layout == "raster"
    for tiles in range(1, 33):
        patches = math.isqrt(tiles**2 * config.block_size) if raster else tiles * max(config.tile_size_hw)
        side = max(
            (patches - 1) * stride + size
            for stride, size in zip(config.patch_stride_hw, config.patch_size_hw, strict=True)
        )
        rows, columns = config.grid_size(side, side)
        if prefers_blocks(layer_pattern(config, rows, columns)):
            return side
    return None


def _kept(config: BigBirdViTConfig, pattern: BlockPattern, attend: Callable | None) -> int:
    """Bytes that `attend`, or without one the whole layer, keeps for the backward pass of one image."""
    heads, tokens = config.num_attention_heads, pattern.num_tokens
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with_sdpa = copy.deepcopy(config)
    with_sdpa.attention_probs_dropout_prob = 0.0
    with_sdpa._attn_implementation = "sdpa"
    alive: list[torch.Tensor] = []  # a freed storage's address would be used again
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        if attend is not None:
            tensors = [torch.empty(1, heads, tokens, config.head_dim, requires_grad=True) for _ in range(3)]
            attend(*tensors, None, pattern=pattern, scaling=1.0)
        else:
            layer = BigBirdViTLayer(with_sdpa, 0)
            rotary = None
            if config.position_embedding_type == "rope":
                tables = rotary_tables(config.head_dim, config.rope_theta, None, *pattern.grid, torch.device("cpu"))
                rotary = with_global_tokens(tables, pattern.num_global_tokens)
            layer(torch.empty(1, tokens, config.hidden_size, requires_grad=True), None, pattern, rotary)
    return sum(storages.values())


def report(config: BigBirdViTConfig, height: int, width: int, cost: AttentionCost) -> str:
    """Return the costs as lines of text, and plain advice."""
    pattern = cost.pattern
    rows, columns = pattern.grid
    lines = [
        f"{height}x{width} pixels: {rows}x{columns} patches, {pattern.num_tokens:,} tokens with CLS and registers",
        f"{pattern.num_tiles:,} tiles, density {pattern.density:.3f}; hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads, {config.num_hidden_layers} layers",
        "",
        "one layer, one image, fp32     forward   with backward   kept for backward",
    ]
    for title, costs in (("attention core", cost.core), ("whole layer", cost.layer)):
        for name, one in costs.items():
            figures = (
                f"{_short(one.forward, 'FLOP'):>12} {_short(one.training, 'FLOP'):>15} {_short(one.kept, 'B'):>19}"
            )
            lines.append(f"{title:<15} {name:<9} {figures}")
        dense, sparse = costs["dense"], costs["sparse"]
        ratios = f"{dense.forward / sparse.forward:>11.1f}x {dense.training / sparse.training:>14.1f}x"
        lines.append(f"{'':<15} {'ratio':<9} {ratios}")
    if cost.mask:
        lines.append(
            f"The mask of dense attention takes {_short(cost.mask, 'B')} more in each layer, once for a batch."
        )
    return "\n".join([*lines, "", _advice(config, cost)])


def measured(config: BigBirdViTConfig, height: int, width: int) -> str:
    """Return as text what each form of attention takes on this machine, on its GPU if it has one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    one_layer = copy.deepcopy(config)
    one_layer.num_hidden_layers = 1
    timed = time_forms(BigBirdViTModel(one_layer).to(device), height, width, 1, torch.float32)
    lines = [f"attention core, one image, fp32, forward and backward on {device.type}, median of several calls:"]
    for form, seconds in sorted(timed.items(), key=lambda one: one[1]):
        lines.append(f"{form:<10} {1e3 * seconds:>10.2f} ms")
    return "\n".join(lines)


def _advice(config: BigBirdViTConfig, cost: AttentionCost) -> str:
    if config.attention_type == "original_full":
        return "`attention_type` is 'original_full': attention is dense at every size."
    if cost.uses_blocks:
        return (
            "On a CPU attention by blocks is the faster form at this size, and `sdpa` uses it. On a GPU\n"
            "`attn_implementation='flex_attention'` computes the same blocks."
        )
    size = "here" if cost.blocks_from is None else f"below about {cost.blocks_from}x{cost.blocks_from} pixels"
    advice = f"On a CPU dense attention is the faster form {size} with these tiles, and `sdpa` uses it."
    if cost.pattern.is_full:
        field = "tile_size" if config.attention_layout == "tiles" else "block_size"
        advice += f"\nEvery tile sees every other at this size. A smaller `{field}` would make attention sparse."
    return advice


def _short(number: float, unit: str) -> str:
    """Three digits and a prefix: `134 GFLOP`."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:,.3g} P{unit}" if number < 999.5 else f"{number:,.0f} P{unit}"
