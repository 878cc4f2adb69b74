"""Configuration of the BigBird vision transformer."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@strict
class BigBirdViTConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of a vision transformer whose patches attend globally, locally and at random.

    Args:
        hidden_size: Width of the tokens. A multiple of `num_attention_heads`.
        num_hidden_layers: Number of transformer layers.
        num_attention_heads: Heads per layer. With rotary positions the head size, `hidden_size / num_attention_heads`,
            is a multiple of 4 (pairs are rotated, half of them for the row and half for the column).
        intermediate_size: Hidden width of the MLP.
        hidden_act: Activation of the MLP, a name transformers knows.
        use_swiglu_ffn: Whether the MLP is gated (Shazeer 2020, arXiv 2002.05202), as in the largest DINOv2;
            `hidden_act` then has no effect.
        gate_act: Activation of a gated MLP's gate, a name transformers knows.
        hidden_dropout_prob: Dropout after the embeddings, in [0, 1).
        attention_probs_dropout_prob: Dropout on the attention probabilities, in [0, 1).
        drop_path_rate: Stochastic depth of the last layer, in [0, 1); it grows linearly from 0 at the first.
        layerscale_value: Initial value of a learned scale on each residual branch; `None` leaves the scale out.
        initializer_range: Standard deviation of the truncated normal initialisation.
        layer_norm_eps: Epsilon of the layer norms.
        qkv_bias: Whether the query, key and value projections have a bias.
        key_bias: False leaves out that of the keys, as DINOv3 does; without `qkv_bias` it has no effect.
        image_size: Nominal image size in pixels, `int` or `(height, width)`. Other sizes work as well.
        patch_size: Patch size in pixels, `int` or `(height, width)`.
        patch_stride: Distance between neighbouring patches in pixels; `None` means `patch_size`, a smaller value
            makes patches overlap.
        patch_embedding: `"linear"`, one linear map of a patch's pixels, or `"conv"`, a stack of 3x3 convolutions, each
            of which halves the image (Xiao et al. 2021, arXiv 2106.14881); `patch_size` is then a power of two.
        num_channels: Channels of the image.
        num_register_tokens: Learned tokens beside CLS that carry no patch (Darcet et al. 2023, arXiv 2309.16588).
        pooling: What `pooler_output` is: the `"mean"` of the valid patch tokens, or the `"cls"` token.
        pooler_act: Activation of a linear layer after the pooling, as ViT has one; `None` leaves both out. Backbones
            and classifiers have neither.
        position_embedding_type: `"rope"`, 2-D rotary positions, or `"absolute"`, a learned table for the grid of
            `image_size`, added to the patches and resampled by a bicubic kernel for images of another size.
        rope_theta: Base of the rotary frequencies; coordinates run from -1 to 1 over the image.
        interpolate_antialias: Whether the table of absolute positions is resampled with antialiasing.
        attention_type: `"block_sparse"`, or `"original_full"` for dense attention (BigBird's own words).
        attention_layout: `"tiles"`, blocks that are rectangles of patches, or `"raster"`, BigBird's own blocks of
            consecutive patches, the first and the last of them global.
        tile_size: Tile of the `tiles` layout in patches, `int` or `(height, width)`. One tile is BigBird's block. The
            default and that of `num_random_blocks` leave 0.57 of the pairs of the default grid of 14x14 patches.
        block_size: Patches in a block of the `raster` layout.
        window_size: Side of the local window in tiles, odd: 3 means the tile itself and its neighbours.
        num_random_blocks: Random tiles that each tile sees besides its window, drawn per layer.
        num_global_tiles: Tiles of the `tiles` layout that see and are seen by all, spread evenly over the image.
        attention_seed: Seed of the random tiles; part of the architecture, so it is stored with the weights.
        out_features: Stages a backbone returns, of `"stem"` (the embeddings) and `"stage1"` to the last layer's;
            default: the last. Or, as `out_indices`, their numbers.
        apply_layernorm: Whether a backbone normalises its feature maps by the model's last layer norm.
        reshape_hidden_states: Whether a backbone's feature maps are `(batch, hidden_size, rows, columns)`, or
            `(batch, 1 + patches, hidden_size)` with CLS first.
    """

    model_type = "bigbird_vit"

    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    intermediate_size: int = 1536
    hidden_act: str = "gelu"
    use_swiglu_ffn: bool = False
    gate_act: str = "silu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layerscale_value: float | int | None = None
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-6
    qkv_bias: bool = True
    key_bias: bool = True
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    patch_stride: int | list[int] | tuple[int, int] | None = None
    patch_embedding: Literal["linear", "conv"] = "linear"
    num_channels: int = 3
    num_register_tokens: int = 0
    pooling: Literal["cls", "mean"] = "mean"
    pooler_act: str | None = None
    position_embedding_type: Literal["rope", "absolute"] = "rope"
    rope_theta: float | int = 100.0
    interpolate_antialias: bool = False
    attention_type: Literal["block_sparse", "original_full"] = "block_sparse"
    attention_layout: Literal["tiles", "raster"] = "tiles"
    tile_size: int | list[int] | tuple[int, int] = 4
    block_size: int = 64
    window_size: int = 3
    num_random_blocks: int = 2
    num_global_tiles: int = 0
    attention_seed: int = 0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True

    def __post_init__(self, **kwargs):
        kwargs.pop("stage_names", None)  # other configurations of transformers save them
        self.set_output_features_output_indices(kwargs.pop("out_features", None), kwargs.pop("out_indices", None))
        super().__post_init__(**kwargs)

    def __setattr__(self, name, value):
        # `from_pretrained(..., num_hidden_layers=2)` sets it afterwards: a backbone of the last stage stays one, and
        # of other stages those are kept that there are still
        stages = getattr(self, "_out_features", None) if name == "num_hidden_layers" else None
        was_last = stages == self.stage_names[-1:] if stages else False
        super().__setattr__(name, value)
        if stages:
            kept = [stage for stage in stages if stage in self.stage_names]
            self.set_output_features_output_indices(None if was_last or not kept else kept, None)

    @property
    def stage_names(self) -> list[str]:
        """What a backbone can return: `"stem"`, the embeddings, and `"stage1"` to the last layer's."""
        return ["stem", *(f"stage{layer + 1}" for layer in range(self.num_hidden_layers))]

    def validate_architecture(self):
        """Check what the field types cannot say; run at creation and before saving.

        Raises:
            ValueError: A field out of range, with the field, the expectation and the value found.
        """
        at_least = {
            "hidden_size": 1,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 1,
            "num_channels": 1,
            "num_register_tokens": 0,
            "block_size": 1,
            "num_random_blocks": 0,
            "num_global_tiles": 0,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}`: expected at least {least}, got {getattr(self, name)}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}`: expected a probability in [0, 1), got {getattr(self, name)}.")
        unit = self.num_attention_heads * (4 if self.position_embedding_type == "rope" else 1)
        if self.hidden_size % unit:
            raise ValueError(
                f"`hidden_size`: expected a multiple of {unit} (`num_attention_heads`, 4 times it with rotary "
                f"positions), got {self.hidden_size}."
            )
        if not self.rope_theta > 0:
            raise ValueError(f"`rope_theta`: expected a number above 0, got {self.rope_theta}.")
        for name in ("hidden_act", "gate_act", "pooler_act"):
            value = getattr(self, name)
            if value not in ACT2FN and not (name == "pooler_act" and value is None):
                raise ValueError(f"`{name}`: expected an activation transformers knows, got {value!r}.")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"`problem_type`: expected one of {PROBLEM_TYPES} or None, got {self.problem_type!r}.")
        if self.window_size < 1 or self.window_size % 2 == 0:
            raise ValueError(f"`window_size`: expected an odd number of tiles, at least 1, got {self.window_size}.")
        for name in ("image_size", "patch_size", "patch_stride", "tile_size"):
            value = getattr(self, name)
            if value is not None and not (len(_pair(value)) == 2 and min(_pair(value)) >= 1):
                raise ValueError(f"`{name}`: expected a positive int or (height, width), got {value}.")
        if any(stride > size for stride, size in zip(self.patch_stride_hw, self.patch_size_hw, strict=True)):
            raise ValueError(
                f"`patch_stride`: expected at most `patch_size` {self.patch_size}, so that no pixel is left out; "
                f"got {self.patch_stride}."
            )
        if self.patch_embedding == "conv":
            height, width = self.patch_size_hw
            if height != width or height < 2 or height & (height - 1):
                raise ValueError(
                    '`patch_size`: expected a power of two, at least 2, with `patch_embedding` "conv", whose layers '
                    f"halve the image; got {self.patch_size}."
                )
            if self.patch_stride_hw != self.patch_size_hw:
                raise ValueError(
                    f'`patch_stride`: expected `patch_size`, {self.patch_size}, with `patch_embedding` "conv", '
                    f"whose patches overlap as they are; got {self.patch_stride}."
                )
        if any(side < patch for side, patch in zip(self.image_size_hw, self.patch_size_hw, strict=True)):
            raise ValueError(f"`image_size`: expected at least one patch {self.patch_size}, got {self.image_size}.")

    def validate_output_attentions(self):
        """Accept `output_attentions` with any implementation: such a call is computed by `eager`."""

    @property
    def output_attentions(self) -> bool:
        """Whether calls return probabilities of attention unless they say otherwise."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool):
        self._output_attentions = value

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def image_size_hw(self) -> tuple[int, int]:
        """Nominal image size, (height, width) in pixels."""
        return _pair(self.image_size)

    @property
    def patch_size_hw(self) -> tuple[int, int]:
        """Patch size, (height, width) in pixels."""
        return _pair(self.patch_size)

    @property
    def patch_stride_hw(self) -> tuple[int, int]:
        """Distance between neighbouring patches, (height, width) in pixels."""
        return _pair(self.patch_size if self.patch_stride is None else self.patch_stride)

    @property
    def tile_size_hw(self) -> tuple[int, int]:
        """Tile of the attention pattern, (height, width) in patches."""
        return _pair(self.tile_size)

    def check_patches_apart(self) -> None:
        """Check that a patch's token is made of its own pixels alone, so that masking it hides them.

        Raises:
            ValueError: Patches that overlap, by `patch_stride` or by `patch_embedding`.
        """
        if self.patch_stride_hw != self.patch_size_hw:
            raise ValueError(
                f"`patch_stride`: expected `patch_size`, {self.patch_size_hw}, for masked images, got "
                f"{self.patch_stride_hw}; patches that overlap show what is masked."
            )
        if self.patch_embedding != "linear":
            raise ValueError(
                f'`patch_embedding`: expected "linear" for masked images, got "{self.patch_embedding}"; patches that '
                "overlap show what is masked."
            )

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the grid of patches of an image.

        Pixels at the lower and right border that fill no whole patch are left out, as in a convolution.

        Args:
            height: Image height in pixels.
            width: Image width in pixels.

        Returns:
            Rows and columns of patches.

        Raises:
            ValueError: The image is smaller than one patch.
        """
        if height < self.patch_size_hw[0] or width < self.patch_size_hw[1]:
            raise ValueError(
                f"`pixel_values`: expected an image of at least one patch {self.patch_size_hw} (height, width) in "
                f"pixels, got {(height, width)}; resize the image or choose a smaller `patch_size`."
            )
        rows = (height - self.patch_size_hw[0]) // self.patch_stride_hw[0] + 1
        columns = (width - self.patch_size_hw[1]) // self.patch_stride_hw[1] + 1
        return rows, columns


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


__all__ = ["BigBirdViTConfig"]
