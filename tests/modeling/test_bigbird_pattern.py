"""The block pattern against its definition, and pinned for ever by a golden table."""

import copy
import pickle
from xml.etree import ElementTree

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_vicreg.modeling.bigbird_pattern import LAYOUTS, block_pattern, random_tiles
from hf_vicreg.modeling.block_sparse_attention import visible_spans
from hf_vicreg.modeling.pattern_picture import COLOURS
from hf_vicreg.modeling.pattern_tables import derived

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
    pattern = block_pattern(
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
    pattern = block_pattern(3, 5, tile_size=(2, 2))
    assert pattern.order.tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    assert pattern.tile_sizes.tolist() == [4, 4, 2, 2, 2, 1]
    assert not pattern.is_raster
    assert block_pattern(3, 5, tile_size=(1, 1)).is_raster


@pytest.mark.parametrize(("height", "width", "block", "num_random"), [(5, 13, 8, 2), (16, 16, 16, 3), (3, 4, 64, 1)])
def test_raster_layout_is_the_papers(height, width, block, num_random):
    pattern = block_pattern(height, width, layout="raster", block_size=block, num_random_blocks=num_random)
    blocks = -(-height * width // block)
    assert pattern.is_raster
    assert pattern.global_tiles == tuple(sorted({0, blocks - 1}))
    for row in range(blocks):
        seen = set(pattern.tile_mask[0, row].nonzero()[:, 0].tolist())
        if row in pattern.global_tiles:
            assert seen == set(range(blocks))
            continue
        known = {0, row - 1, row, row + 1, blocks - 1}
        assert known <= seen
        assert len(seen) == min(len(known) + num_random, blocks)
    assert pattern.density == pytest.approx(pattern.token_mask().double().mean().item(), abs=1e-12)


def test_global_tiles_see_and_are_seen_by_all():
    pattern = block_pattern(20, 12, tile_size=(4, 4), num_global_tiles=3, num_random_blocks=1)
    assert pattern.global_tiles == (4, 9, 11)
    assert pattern.tile_mask[:, [4, 9, 11]].all()
    assert pattern.tile_mask[:, :, [4, 9, 11]].all()
    assert not pattern.is_full
    assert pattern.density == pytest.approx(pattern.token_mask().double().mean().item(), abs=1e-12)
    assert block_pattern(4, 4, tile_size=(2, 2), num_global_tiles=9).global_tiles == (0, 1, 2, 3)


def test_tables_can_be_injected():
    pattern = block_pattern(4, 8, tile_size=(4, 2), num_global_tiles=1, num_global_tokens=0)
    assert pattern.global_tiles == (2,)
    table = torch.tensor([[[0, -1], [1, 0], [2, -1], [3, -1]], [[0, -1], [1, -1], [2, -1], [-1, 3]]])
    injected = pattern.with_neighbours(table)
    assert injected.neighbours.tolist() == [
        [[0, 2, -1], [0, 1, 2], [2, -1, -1], [2, 3, -1]],
        [[0, 2, -1], [1, 2, -1], [2, -1, -1], [2, 3, -1]],
    ]
    assert injected.density == pytest.approx(injected.token_mask().double().mean().item(), abs=1e-12)
    assert pattern.neighbours.shape[0] == 1  # unchanged


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.zeros(1, 3, 2, dtype=torch.int64), r"`neighbours`: expected int64 \(heads or 1, 4 tiles, slots\)"),
        (torch.zeros(1, 4, 2), "got torch.float32"),
        (torch.zeros(1, 4, 2, dtype=torch.int64), r"different tiles below 4, got \[0, 0\]"),
        (torch.full((1, 4, 1), -1), "expected a tile for each to see, as nothing is global; got an empty row"),
        (torch.full((1, 4, 1), 4), r"different tiles below 4, got \[4\]"),
        (torch.full((1, 4, 1), -2), r"different tiles below 4, got \[-2\]"),
    ],
    ids=["tiles", "type", "twice", "empty", "too-high", "negative"],
)
def test_bad_tables_are_named(table, message):
    with pytest.raises(ValueError, match=message):
        block_pattern(4, 8, tile_size=(4, 2), num_global_tokens=0).with_neighbours(table)


def test_tiles_may_see_global_tokens_alone():
    pattern = block_pattern(4, 4, tile_size=(2, 2)).with_neighbours(torch.full((1, 4, 1), -1))
    assert pattern.token_mask()[0, 1:].sum(-1).tolist() == [1] * 16


def test_names_follow_from_contents_and_survive_copies():
    pattern, same = (block_pattern(6, 6, tile_size=(2, 2), num_random_blocks=0, seed=seed) for seed in (0, 1))
    assert pattern.name == same.name
    assert pattern.name != block_pattern(6, 6, tile_size=(3, 2), num_random_blocks=0).name
    for made in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert made.name == pattern.name
        assert torch.equal(made.neighbours, pattern.neighbours)
        assert torch.equal(derived(made, visible_spans), derived(pattern, visible_spans))
        assert derived(made, visible_spans) is not derived(pattern, visible_spans)  # a copy makes its own


def test_picture_shows_what_a_tile_sees_and_at_which_level():
    pattern = block_pattern(14, 14, tile_size=(2, 2), num_global_tiles=1, num_random_blocks=2, window_size=3)
    (center,) = pattern.global_tiles
    assert center == 24
    picture = pattern.picture(8).replace("\n", " ").split(" ")
    seen = pattern.tile_mask[0, 8].nonzero()[:, 0].tolist()
    assert [index for index, mark in enumerate(picture) if mark != "."] == seen
    window = [0, 1, 2, 7, 9, 14, 15, 16]
    marks = {"Q": [8], "G": [24], "#": window, "r": sorted(set(seen) - {8, 24, *window})}
    for mark, tiles in marks.items():
        assert [index for index, found in enumerate(picture) if found == mark] == tiles
    assert len(marks["r"]) == 2
    assert pattern.picture() == pattern.picture(24)
    assert set(pattern.picture()) == {"Q", "G", " ", "\n"}  # a global tile sees all
    with pytest.raises(ValueError, match="`tile`: expected 0 to 48, got -1"):
        pattern.picture(-1)
    assert str(pattern).startswith("14x14 patches in 7x7 tiles, 1 global tokens, density 0.")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_svg_is_well_formed_and_paints_what_is_seen(layout):
    # few cells: each has a rectangle of its own
    pattern = block_pattern(8, 10, layout=layout, tile_size=(2, 2), block_size=4, num_random_blocks=1)
    root = ElementTree.fromstring(pattern.svg())
    fills = [one.get("fill") for one in root.iter("{http://www.w3.org/2000/svg}rect")]
    expected = [level for tile in range(pattern.num_tiles) for level in pattern.levels(tile)]
    expected += pattern.levels(pattern.num_tiles // 2 if layout == "raster" else 12)
    for level, colour in COLOURS.items():
        assert fills.count(colour) == expected.count(level) + (level != "")  # and once in the legend
    assert pattern._repr_svg_() == pattern.svg()


def test_svg_of_many_tiles_draws_runs():
    assert len(block_pattern(256, 256).svg()) < 1_500_000


def test_golden_table():
    # random links are part of the architecture: a change here changes every published model
    pattern = block_pattern(8, 8, tile_size=(2, 2), num_random_blocks=2, seed=0, layer=0)
    assert pattern.neighbours[0, :4].tolist() == [
        [0, 1, 4, 5, 14, 15, -1, -1, -1, -1, -1],
        [0, 1, 2, 3, 4, 5, 6, 14, -1, -1, -1],
        [0, 1, 2, 3, 5, 6, 7, 14, -1, -1, -1],
        [2, 3, 6, 7, 13, 14, -1, -1, -1, -1, -1],
    ]
    assert random_tiles(7, 3, 1, 5, set(), 40, 4) == [4, 9, 10, 28]


def test_random_tiles_differ_by_layer_seed_and_row():
    draws = {
        (seed, layer): tuple(
            block_pattern(40, 40, tile_size=(4, 4), seed=seed, layer=layer).neighbours.flatten().tolist()
        )
        for seed in range(2)
        for layer in range(4)
    }
    assert len(set(draws.values())) == len(draws)


def test_random_tiles_span_the_image():
    # over many layers, every tile beyond the window of tile 0 is drawn, far ones as often as near ones
    counts = torch.zeros(100)
    for layer in range(300):
        row = block_pattern(20, 20, tile_size=(2, 2), num_random_blocks=3, layer=layer).neighbours[0, 0]
        counts[row[row >= 0]] += 1
    beyond = counts[counts < 300]
    assert len(beyond) == 96
    assert beyond.sum() == 900
    assert beyond.min() >= 1
    assert beyond.max() <= 27  # mean 9.4, six standard deviations


def test_tables_do_not_touch_global_randomness():
    before = torch.get_rng_state()
    block_pattern(11, 9, tile_size=(2, 2), seed=99, layer=7)
    assert torch.equal(before, torch.get_rng_state())


def test_tables_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        pattern = block_pattern(9, 11, tile_size=(2, 2), seed=1234)
    assert not pattern.order.is_inference()
    assert not pattern.neighbours.is_inference()


def test_tables_do_not_follow_the_default_device():
    with torch.device("meta"):
        pattern = block_pattern(9, 12, tile_size=(2, 2), seed=4321)
        assert pattern.tile_mask.device.type == "cpu"
        assert not pattern.is_raster
        assert 0 < pattern.density < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": 2}, "`window_size`: expected an odd"),
        ({"num_random_blocks": -1}, "`num_random_blocks`: expected at least 0, got -1"),
        ({"tile_size": (0, 2)}, "`tile_size`: expected at least 1, got 0"),
        ({"block_size": 0}, "`block_size`: expected at least 1, got 0"),
        ({"num_global_tiles": -1}, "`num_global_tiles`: expected at least 0, got -1"),
        ({"layout": "hexagons"}, r"`layout`: expected one of \('tiles', 'raster'\), got 'hexagons'"),
    ],
    ids=["even-window", "negative-random", "empty-tile", "empty-block", "negative-global", "layout"],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        block_pattern(4, 4, **change)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 9, 16])
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (7, 7), (4, 8), (8, 4), (6, 10), (2, 16), (16, 1)])
def test_global_tiles_are_spread_over_both_sides(rows, columns, count):
    tiles = block_pattern(rows, columns, tile_size=(1, 1), num_global_tiles=count).global_tiles
    places = [divmod(tile, columns) for tile in tiles]
    assert len(set(places)) == min(count, rows * columns)
    assert list(tiles) == sorted(tiles)
    if len(places) == count:
        mean_row, mean_column = (sum(side) / count for side in zip(*places, strict=True))
        assert abs(mean_row + 0.5 - rows / 2) <= max(1, rows / (2 * count))
        assert abs(mean_column + 0.5 - columns / 2) <= max(1, columns / (2 * count))
        # no tile is much further from a global one than in a square lattice of as many
        reach = max(
            min(max(abs(row - one), abs(column - other)) for one, other in places)
            for row in range(rows)
            for column in range(columns)
        )
        assert reach <= max((rows * columns / count) ** 0.5 + 0.5, max(rows, columns) / count)


def test_four_global_tiles_stand_in_the_four_quarters():
    places = [divmod(tile, 8) for tile in block_pattern(16, 16, tile_size=(2, 2), num_global_tiles=4).global_tiles]
    assert places == [(2, 2), (2, 6), (6, 2), (6, 6)]


@pytest.mark.parametrize("mode", ["fake", "default-device", "inference"])
def test_tables_first_read_under_a_mode_are_ordinary_ones(mode):
    modes = {
        "fake": FakeTensorMode,
        "default-device": lambda: torch.device("meta"),
        "inference": torch.inference_mode,
    }
    pattern = block_pattern(6, 10, tile_size=(2, 2), seed=len(mode)).with_neighbours(torch.arange(15)[None, :, None])
    expected = block_pattern(6, 10, tile_size=(2, 2)).with_neighbours(torch.arange(15)[None, :, None])
    seen = torch.arange(15).flip(0)[None, :, None]
    with modes[mode]():
        mask, spans = pattern.tile_mask, derived(pattern, visible_spans)
        other = pattern.with_neighbours(seen)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, expected.tile_mask)
    assert not mask.is_inference()
    assert type(spans) is torch.Tensor
    assert torch.equal(spans, derived(expected, visible_spans))
    assert not spans.is_inference()
    assert other.neighbours[0, 0].tolist() == [14]
    assert other.tile_sizes.tolist() == pattern.tile_sizes.tolist()
