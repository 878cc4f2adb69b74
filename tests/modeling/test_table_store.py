"""Tables are kept by content, up to a bound, and made once."""

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_vicreg.modeling import bigbird_pattern, dense_attention, table_store
from hf_vicreg.modeling.bigbird_pattern import block_pattern, named_pattern
from hf_vicreg.modeling.table_store import TableStore


@pytest.fixture
def store(monkeypatch):
    """A store of its own for the test, of a megabyte."""
    own = TableStore(2**20)
    for module in (table_store, bigbird_pattern):
        monkeypatch.setattr(module, "STORE", own)
    return own


def test_the_oldest_are_forgotten_beyond_the_bound():
    store = TableStore(100)
    for key in range(5):
        store.get(key, lambda: torch.zeros(30, dtype=torch.uint8))
        store.get(0, lambda: pytest.fail("forgotten although just used"))
    assert store.bytes == 90
    assert len(store) == 3
    store.get("large", lambda: torch.zeros(1000, dtype=torch.uint8))  # the latest is always kept
    assert (len(store), store.bytes) == (1, 1000)


def test_patterns_of_many_sizes_are_forgotten_and_found_again_by_name(store):
    first = block_pattern(20, 20, tile_size=(2, 2), num_random_blocks=2, seed=9)
    name, neighbours, alive = first.name, first.neighbours.clone(), weakref.ref(first)
    del first
    for side in range(21, 60):
        block_pattern(side, side, tile_size=(2, 2), seed=9)
        assert store.bytes <= 2**20 or len(store) == 1
    gc.collect()
    assert alive() is None
    assert torch.equal(named_pattern(name).neighbours, neighbours)  # as a compiled graph asks for it


def test_patterns_with_tables_of_their_own_are_found_by_name_while_kept(store):
    names = []
    for shift in range(3):
        table = (torch.arange(16) + shift).remainder(16)[None, :, None]
        names.append(block_pattern(8, 8, tile_size=(2, 2)).with_neighbours(table).name)
    gc.collect()
    assert [named_pattern(name).neighbours[0, 0, 0].item() for name in names] == [0, 1, 2]


def test_tables_are_kept_by_content(store):
    pattern = block_pattern(6, 10, tile_size=(2, 2), seed=3)
    arguments = torch.float32, torch.device("cpu")
    bias = dense_attention._cached_dense_bias(pattern, *arguments)
    assert dense_attention._cached_dense_bias(copy.deepcopy(pattern), *arguments) is bias


def test_masks_of_many_layers_do_not_push_each_other_out(store):
    store.max_bytes = 2**30
    made = []
    for _ in range(2):
        for layer in range(40):
            pattern = block_pattern(8, 8, tile_size=(2, 2), layer=layer)
            made.append(dense_attention._cached_dense_bias(pattern, torch.float32, torch.device("cpu")))
    assert all(one is other for one, other in zip(made[:40], made[40:], strict=True))


def test_threads_share_what_one_of_them_makes(store):
    barrier, made = threading.Barrier(8), []

    def ask(_):
        barrier.wait()
        made.append(block_pattern(40, 41, tile_size=(2, 2), seed=11))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(8)))
    assert len({id(one) for one in made}) == 1


def test_what_cannot_be_made_is_asked_for_again(store):
    def fail():
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            store.get("key", fail)
    assert store.get("key", lambda: 1) == 1
