"""When an image gives the same features alone and in a padded batch, and when it does not."""

import pytest
import torch

from hf_vicreg import BigBirdViTConfig, BigBirdViTModel

ALIGNED = {"num_random_blocks": 0}
DENSE = {"attention_type": "original_full"}


def difference(size, offset=(0, 0), **changes):
    settings = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 4,
        "tile_size": 2,
        "num_random_blocks": 2,
        "initializer_range": 0.2,
    }
    model = BigBirdViTModel(BigBirdViTConfig(**settings | changes)).double().eval()
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    canvas, mask = torch.randn(2, 3, 56, 64, dtype=torch.float64), torch.ones(2, 56, 64)
    mask[0] = 0
    inside = (0, ..., slice(offset[0], offset[0] + size[0]), slice(offset[1], offset[1] + size[1]))
    canvas[inside], mask[inside] = image[0], 1
    alone, padded = model(image).pooler_output, model(canvas, pixel_mask=mask).pooler_output[:1]
    return ((padded - alone).norm() / alone.norm()).item()


@pytest.mark.parametrize(
    "changes",
    [
        ALIGNED,
        ALIGNED | {"position_embedding_type": "absolute"},
        ALIGNED | {"offset": (8, 16)},
        ALIGNED | {"window_size": 5, "pooling": "cls"},
        DENSE,
        DENSE | {"offset": (4, 12)},
        ALIGNED | {"offset": (8, 16), "patch_embedding": "conv"},
    ],
    ids=["tiles", "absolute", "whole-tiles-away", "wide", "dense", "dense-anywhere", "convolutions"],
)
def test_an_image_of_whole_patches_is_the_same_in_a_padded_batch(changes):
    assert difference((28, 36), **changes) < 1e-12


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ((30, 36), ALIGNED),
        ((28, 36), ALIGNED | {"patch_stride": 2}),
        ((28, 36), {}),
        ((28, 36), ALIGNED | {"num_global_tiles": 1}),
        ((28, 36), ALIGNED | {"offset": (4, 0)}),
        ((28, 36), ALIGNED | {"attention_layout": "raster", "block_size": 6}),
    ],
    ids=["part-of-a-patch", "overlapping-patches", "random-tiles", "global-tiles", "part-of-a-tile", "raster"],
)
def test_and_where_the_guide_says_that_it_is_not(size, changes):
    assert difference(size, **changes) > 1e-3
