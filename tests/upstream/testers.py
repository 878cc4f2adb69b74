"""What the upstream mixins ask for: tiny configurations and inputs of our models."""

import torch

from hf_vicreg import BigBirdViTConfig, BigBirdViTMAEConfig, VicRegConfig


class BigBirdViTTester:
    """Makes configurations and images of one grid of patches.

    Args:
        parent: The test case, which upstream's helpers use.
        grid: Rows and columns of patches.
        patch_size: In pixels.
        padded: Whether the images come with a mask that leaves out the lower part of one and the right of another.
        fields: Fields of the configuration.
    """

    def __init__(self, parent, grid=(7, 13), patch_size=2, padded=False, **fields):
        self.parent = parent
        self.grid = grid
        self.padded = padded
        self.batch_size = 3
        self.num_channels = 3
        self.is_training = True
        self.image_size = (grid[0] * patch_size, grid[1] * patch_size)
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.num_attention_heads = 2
        self.seq_length = 1 + fields.get("num_register_tokens", 0) + grid[0] * grid[1]
        self.attn_implementation = "sdpa"
        self.fields = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": 37,
            "image_size": self.image_size,
            "patch_size": patch_size,
            "tile_size": 2,
            "num_random_blocks": 2,
            "out_features": ["stem", "stage1"],
            **fields,
        }

    def get_config(self) -> BigBirdViTConfig:
        return BigBirdViTConfig(**self.fields, attn_implementation=self.attn_implementation)

    def prepare_config_and_inputs_for_common(self):
        inputs = {"pixel_values": torch.rand(self.batch_size, self.num_channels, *self.image_size)}
        if self.padded:
            mask = torch.ones(self.batch_size, *self.image_size, dtype=torch.int64)
            mask[0, self.image_size[0] // 2 :] = 0
            mask[1, :, self.image_size[1] // 3 :] = 0
            inputs["pixel_mask"] = mask
        return self.get_config(), inputs


class MaskedImageTester(BigBirdViTTester):
    """Makes square images, and what upstream wants to know of masks: an image's side as one number, masked patches."""

    def __init__(self, parent, grid=(6, 6), patch_size=4, num_masks=10, **fields):
        super().__init__(parent, grid=grid, patch_size=patch_size, **fields)
        self.num_masks = num_masks
        self.mask_length = grid[0] * grid[1]
        self.image_size, self.patch_size = grid[0] * patch_size, patch_size
        self.fields["image_size"] = self.image_size

    def prepare_config_and_inputs_for_common(self):
        side = self.image_size
        return self.get_config(), {"pixel_values": torch.rand(self.batch_size, self.num_channels, side, side)}


class MAETester(MaskedImageTester):
    """Makes configurations of a masked autoencoder around that encoder, whose tokens are those of visible patches."""

    def __init__(self, parent, **fields):
        super().__init__(parent, **fields)
        self.seq_length = 1 + 2 * 4  # two of nine tiles

    def get_config(self) -> BigBirdViTMAEConfig:
        return BigBirdViTMAEConfig(
            encoder=super().get_config(),
            decoder_hidden_size=16,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=24,
            attn_implementation=self.attn_implementation,
        )


class VicRegTester(BigBirdViTTester):
    """Makes configurations of VICReg around that encoder, and pairs of views."""

    def __init__(self, parent, expander_norm="batch", **fields):
        super().__init__(parent, **fields)
        self.expander_norm = expander_norm

    def get_config(self) -> VicRegConfig:
        return VicRegConfig(
            encoder=super().get_config(),
            expander_sizes=[48, 48, 40],
            expander_norm=self.expander_norm,
            attn_implementation=self.attn_implementation,
        )

    def prepare_config_and_inputs_for_common(self):
        views = torch.rand(self.batch_size, 2, self.num_channels, *self.image_size)
        return self.get_config(), {"pixel_values": views}
