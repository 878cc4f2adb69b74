"""The order of images without end: a permutation, as good as a shuffled list, of which nothing else is made."""

import math
import random
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from hf_vicreg.training.images.order import SHUFFLED, StepSampler, keyed_permutation

TEN = [2, 1, 9, 6, 0, 7, 8, 4, 5, 3]
OF_A_BILLION = [386987000, 496542000, 649503304]
FARTHEST = 5.0  # standard deviations; one draw in a million is beyond


def keyed(length, seed):
    return keyed_permutation(f"{seed}/0", length, np.arange(length))


def shuffled(length, seed):
    return np.random.default_rng(seed).permutation(length)


def cyclic(length, seed):
    """What is no shuffling: the statistics have to tell it from one."""
    return (np.arange(length) * 7 + seed) % length


def off(counts, expected):
    """How far counts are from equal ones, in standard deviations of chi squared."""
    counts = np.asarray(counts, float).ravel()
    chi = ((counts - expected) ** 2 / expected).sum()
    return abs(chi - (counts.size - 1)) / math.sqrt(2 * (counts.size - 1))


def places(permutation):
    """Each index at each place, 1,500 times of 30."""
    table = np.zeros((30, 30))
    for seed in range(1500):
        table[np.arange(30), permutation(30, seed)] += 1
    return off(table, 1500 / 30)


def neighbours(permutation):
    """Distances of neighbours, round the circle."""
    steps = np.concatenate([np.diff(permutation(101, seed)) % 101 for seed in range(600)])
    return off(np.bincount(steps, minlength=101)[1:], 600 * 100 / 100)


def whole_orders(permutation):
    """Each of the 24 orders of four, odd ones as well."""
    counts = Counter(tuple(permutation(4, seed)) for seed in range(2400))
    return off(list(counts.values()) + [0] * (24 - len(counts)), 100)


def signs(permutation):
    """Even and odd orders of nine, a square of an odd number."""
    odd = sum(np.linalg.det(np.eye(9)[permutation(9, seed)]) < 0 for seed in range(400))
    return off([odd, 400 - odd], 200)


def epochs(permutation):
    """Where an index stands in an epoch, given where it stood in the one before."""
    table, before = np.zeros((20, 20)), permutation(1009, 0)
    for seed in range(1, 40):
        after = permutation(1009, seed)
        np.add.at(table, (np.argsort(before) * 20 // 1009, np.argsort(after) * 20 // 1009), 1)
        before = after
    return off(table, table.sum() / 400)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100, 1009, 1023, 1024, 1025, 65_535, 65_536, 65_537])
def test_every_index_comes_once(length):
    found = keyed(length, 3)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(length))
    some = np.arange(length)[:: -(-length // 5)]
    assert np.array_equal(keyed_permutation("3/0", length, some), found[some])  # of any positions, in any batch


@pytest.mark.parametrize("statistic", [places, neighbours, whole_orders, signs, epochs], ids=lambda one: one.__name__)
def test_it_is_as_good_as_a_shuffled_list(statistic):
    assert statistic(keyed) < FARTHEST
    assert statistic(shuffled) < FARTHEST  # the statistic itself is right
    assert statistic(cyclic) > 2 * FARTHEST  # and can tell


def test_epochs_and_seeds_meet_by_chance_alone():
    orders = [keyed_permutation(f"{seed}/{epoch}", 1009, np.arange(1009)) for seed in range(8) for epoch in range(8)]
    met = [int((one == other).sum()) for place, one in enumerate(orders) for other in orders[:place]]
    # in two random orders an index stands at the same place once, with a variance of one
    assert abs(np.mean(met) - 1) < FARTHEST / math.sqrt(len(met))


def test_the_order_is_what_it_was():
    # runs that began with it go on with it, whatever version they are resumed by
    assert keyed_permutation("0/0", 10, np.arange(10)).tolist() == TEN
    assert keyed_permutation("7/3", 10**9, np.array([0, 1, 10**9 - 1])).tolist() == OF_A_BILLION


def test_a_billion_images_take_no_memory():
    for first_step in (0, 1_000_000):
        sampler = StepSampler(10**9, 256, 0, first_step, 2_000_000, 1, 2, pieces=2)
        tracemalloc.start()
        pieces = list(islice(sampler, 8))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 200_000
        assert [len(piece) for piece in pieces] == [64] * 8
        assert len({index for piece in pieces for _, index in piece}) == 512
    assert StepSampler(10**9, 256, 0, 1_000_000, 1_000_001, 1, 2).share == slice(128, 256)


def test_the_order_of_0_1_0_is_still_known():
    found = [index for batch in StepSampler(22, 5, 3, 0, 8, 0, 1, order=SHUFFLED) for _, index in batch]
    for epoch in range(2):
        order = list(range(22))
        random.Random(f"3/{epoch}").shuffle(order)
        assert found[epoch * 20 : epoch * 20 + 20] == order[:20]
