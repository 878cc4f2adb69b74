"""The block pattern against its definition, and pinned for ever by a golden table."""

import pytest
import torch

from hf_vicreg.modeling.bigbird_pattern import random_tiles, tile_pattern

GRIDS = [
    pytest.param(1, 1, (8, 8), id="1x1-t8"),
    pytest.param(8, 8, (2, 2), id="8x8-t2"),
    pytest.param(7, 13, (2, 2), id="7x13-t2"),
    pytest.param(33, 20, (8, 4), id="33x20-t8x4"),
    pytest.param(16, 16, (16, 16), id="16x16-one-tile"),
]


def mask_from_definition(height, width, tile, window, num_random, seed, layer):
    """Whether each patch (raster order) sees each other, pair by pair, without the random level; and the tiles."""
    columns = -(-width // tile[1])
    where = [(row // tile[0], column // tile[1]) for row in range(height) for column in range(width)]
    local = torch.tensor(
        [[max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= window // 2 for b in where] for a in where], dtype=torch.bool
    )
    return local, torch.tensor([row * columns + column for row, column in where])


@pytest.mark.parametrize(("height", "width", "tile"), GRIDS)
@pytest.mark.parametrize("num_random", [0, 3])
def test_pattern_is_window_plus_random_tiles_plus_globals(height, width, tile, num_random):
    pattern = tile_pattern(
        height, width, tile_size=tile, num_random_blocks=num_random, num_global_tokens=2, seed=5, layer=1
    )
    local, tile_of = mask_from_definition(height, width, tile, 3, num_random, 5, 1)
    seen = pattern.token_mask()[0]
    assert seen[:2].all()
    assert seen[:, :2].all()
    inverse = pattern.order.argsort()
    patches = seen[2:, 2:][inverse][:, inverse]  # raster order
    assert patches[local].all()
    beyond = patches & ~local
    num_tiles = int(tile_of.max()) + 1
    for patch in range(height * width):
        tiles_beyond = set(tile_of[beyond[patch]].tolist())
        outside_window = num_tiles - len(set(tile_of[local[patch]].tolist()))
        assert len(tiles_beyond) == min(num_random, outside_window)
        for other in tiles_beyond:  # whole tiles, and the same for every patch of the tile
            assert patches[patch][tile_of == other].all()
    assert pattern.density == pytest.approx(seen.double().mean().item(), abs=1e-12)
    assert pattern.is_full == bool(seen.all())


def test_order_is_tile_major():
    pattern = tile_pattern(3, 5, tile_size=(2, 2))
    assert pattern.order.tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    assert pattern.tile_sizes.tolist() == [4, 4, 2, 2, 2, 1]
    assert not pattern.is_raster
    assert tile_pattern(3, 5, tile_size=(1, 1)).is_raster


def test_golden_table():
    # random links are part of the architecture: a change here changes every published model
    pattern = tile_pattern(8, 8, tile_size=(2, 2), num_random_blocks=2, seed=0, layer=0)
    assert pattern.neighbours[0, :4].tolist() == [
        [0, 1, 4, 5, 14, 15, -1, -1, -1, -1, -1],
        [0, 1, 2, 3, 4, 5, 6, 14, -1, -1, -1],
        [0, 1, 2, 3, 5, 6, 7, 14, -1, -1, -1],
        [2, 3, 6, 7, 13, 14, -1, -1, -1, -1, -1],
    ]
    assert random_tiles(7, 3, 1, 5, list(range(40)), 4) == [4, 9, 10, 28]


def test_random_tiles_differ_by_layer_seed_and_row():
    draws = {
        (seed, layer): tuple(
            tile_pattern(40, 40, tile_size=(4, 4), seed=seed, layer=layer).neighbours.flatten().tolist()
        )
        for seed in range(2)
        for layer in range(4)
    }
    assert len(set(draws.values())) == len(draws)


def test_random_tiles_span_the_image():
    # over many layers, every tile beyond the window of tile 0 is drawn, far ones as often as near ones
    counts = torch.zeros(100)
    for layer in range(300):
        row = tile_pattern(20, 20, tile_size=(2, 2), num_random_blocks=3, layer=layer).neighbours[0, 0]
        counts[row[row >= 0]] += 1
    beyond = counts[counts < 300]
    assert len(beyond) == 96
    assert beyond.sum() == 900
    assert beyond.min() >= 1
    assert beyond.max() <= 27  # mean 9.4, six standard deviations


def test_tables_do_not_touch_global_randomness():
    before = torch.get_rng_state()
    tile_pattern(11, 9, tile_size=(2, 2), seed=99, layer=7)
    assert torch.equal(before, torch.get_rng_state())


def test_tables_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        pattern = tile_pattern(9, 11, tile_size=(2, 2), seed=1234)
    assert not pattern.order.is_inference()
    assert not pattern.neighbours.is_inference()


def test_tables_do_not_follow_the_default_device():
    with torch.device("meta"):
        pattern = tile_pattern(9, 12, tile_size=(2, 2), seed=4321)
        assert pattern.tile_mask.device.type == "cpu"
        assert not pattern.is_raster
        assert 0 < pattern.density < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": 2}, "`window_size`: expected an odd"),
        ({"num_random_blocks": -1}, "`num_random_blocks`: expected at least 0, got -1"),
        ({"tile_size": (0, 2)}, "`tile_size`: expected at least 1, got 0"),
    ],
    ids=["even-window", "negative-random", "empty-tile"],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        tile_pattern(4, 4, **change)
