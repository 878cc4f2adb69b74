"""Copies, outliers and spread labels against plain loops over all pairs."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from hf_vicreg.explore import finds
from hf_vicreg.explore.analysis import clusters_of, neighbours_of
from hf_vicreg.explore.finds import (
    ROUNDS,
    SETTLED,
    TEMPERATURE,
    find_copies,
    find_outliers,
    set_apart,
    spread_labels,
    strangeness,
)
from hf_vicreg.explore.vector_index import MOST_COMPARED, VectorIndex, build_index


def directions(count, features=8, seed=0, clouds=4):
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((clouds, features))
    found = centres[np.arange(count) % clouds] + 0.3 * generator.standard_normal((count, features))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def indexed(vectors, path):
    build_index(vectors, path)
    return VectorIndex(path)


@pytest.fixture
def vectors():
    found = directions(57)
    found[[50, 51]] = found[3]  # three in one place
    found[52] = found[4]
    return found


@pytest.fixture
def near(vectors, tmp_path):
    return neighbours_of(indexed(vectors, tmp_path / "index"), vectors)


def test_neighbours_are_the_nearest_others(vectors, near):
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    rows, found = near
    assert not (rows == np.arange(len(vectors))[:, None]).any()
    np.testing.assert_allclose(found, -np.sort(-cosines, 1)[:, :10], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(cosines, rows, 1), found, atol=1e-6)


def test_more_copies_than_neighbours_leave_no_image_among_its_own(tmp_path):
    vectors = np.repeat(directions(2), 20, 0)
    rows, _ = neighbours_of(indexed(vectors, tmp_path / "index"), vectors)
    assert rows.shape == (40, 10)
    assert not (rows == np.arange(40)[:, None]).any()


def test_copies_are_what_close_pairs_join(vectors, near):
    digests = [bytes([row]) for row in range(len(vectors))]
    digests[50] = digests[3]
    found = find_copies(*near, digests, 0.25)
    distances = 1 - vectors @ vectors.T
    np.fill_diagonal(distances, 9)
    limit = 0.25 * np.median(distances.min(1))
    parts = {row: {row} for row in range(len(vectors))}
    for one, other in np.argwhere(distances <= limit).tolist():
        joined = parts[one] | parts[other]
        for row in joined:
            parts[row] = joined
    expected = {frozenset(part) for part in parts.values() if len(part) > 1}
    assert {frozenset(group) for group in found.groups} == expected
    assert {frozenset((3, 50, 51)), frozenset((4, 52))} <= expected
    assert found.usual == pytest.approx(np.median(distances.min(1)), abs=1e-6)
    assert dict(zip(map(tuple, found.groups), found.identical, strict=True))[3, 50, 51] == 2
    assert find_copies(*near, digests, 0.0).groups == [[3, 50, 51], [4, 52]]


def test_what_is_strange_is_far_by_the_sets_own_covariance(monkeypatch):
    generator = np.random.default_rng(0)
    rows = (generator.standard_normal((300, 4)) * [5, 1, 0.5, 0.3] + [7, -3, 0, 1]).astype(np.float32)
    rows[17] += [0, 0, 0, 4]  # less, but in a direction in which the others hardly differ
    rows[40] += [12, 0, 0, 0]
    found = strangeness(rows)
    fitted = LedoitWolf().fit(rows.astype(np.float64))
    expected = [
        float((row - fitted.location_) @ np.linalg.inv(fitted.covariance_) @ (row - fitted.location_)) for row in rows
    ]
    np.testing.assert_allclose(found, np.sqrt(expected) / np.median(np.sqrt(expected)), rtol=1e-4)
    assert np.median(found) == pytest.approx(1)
    assert find_outliers(found, 3)[0] == (17, found[17])
    assert [row for row, _ in find_outliers(found, 300)] == np.argsort(-found, kind="stable").tolist()
    monkeypatch.setattr(finds, "CHUNK", 7)
    np.testing.assert_allclose(strangeness(rows), found, rtol=1e-6)
    monkeypatch.setattr(finds, "MOST_FITTED", 100)
    assert find_outliers(strangeness(rows), 1)[0][0] == 17
    assert find_outliers(strangeness(rows[:2]), 5) == [(0, 0.0), (1, 0.0)]


def test_what_is_strange_in_several_layers_is_their_mean():
    generator = np.random.default_rng(0)
    first, second = (generator.standard_normal((50, size)).astype(np.float32) for size in (4, 7))
    expected = (strangeness(first) + strangeness(second)) / 2
    np.testing.assert_allclose(strangeness(first, second), expected, rtol=1e-6)
    np.testing.assert_array_equal(strangeness(first), strangeness(first, first))


def test_labels_spread_as_a_dense_matrix_spreads_them(tmp_path):
    vectors = directions(80, 3, clouds=1)  # one cloud: labels meet
    rows, cosines = neighbours_of(indexed(vectors, tmp_path / "index"), vectors)
    given = {0: 0, 1: 1, 2: 2, 4: 0}
    links = np.zeros((len(vectors),) * 2)
    for row in range(len(vectors)):
        links[row, rows[row]] = np.exp((cosines[row] - 1) / TEMPERATURE)
    links += links.T
    steps = links / links.sum(1, keepdims=True)
    mass = np.zeros((len(vectors), 3))
    for turn in range(ROUNDS + 1):
        before, mass = mass, steps @ mass
        for row, label in given.items():
            mass[row] = np.eye(3)[label]
        if turn and np.abs(mass - before).max() < SETTLED:
            break
    classes, sure = spread_labels(rows, cosines, given, 3)
    arrived = mass.sum(1) > 0
    assert ((classes >= 0) == arrived).all()
    np.testing.assert_allclose(sure[arrived], mass[arrived].max(1) / mass[arrived].sum(1), atol=1e-3)
    assert (classes == mass.argmax(1))[arrived].all()
    assert classes[[0, 1, 2, 4]].tolist() == [0, 1, 2, 0]
    assert sure[[0, 1, 2, 4]].tolist() == [1, 1, 1, 1]
    assert (sure[arrived] < 0.99).sum() > 20


def test_where_no_label_arrives_there_is_none():
    rows, cosines = np.array([[1], [0], [3], [2]], np.int32), np.ones((4, 1), np.float32)
    classes, sure = spread_labels(rows, cosines, {0: 0}, 1)
    assert classes.tolist() == [0, 0, -1, -1]
    assert sure.tolist() == [1, 1, 0, 0]


def test_clusters_are_ordered_by_size_and_named_by_their_middle():
    vectors = directions(90, clouds=2)[np.r_[0:90:2, 1:30:2]]
    clusters, central = clusters_of(vectors)
    sizes = np.bincount(clusters)
    assert sizes.tolist() == sorted(sizes, reverse=True)
    assert len(central) == len(sizes)
    for number, rows in enumerate(central):
        assert (clusters[rows[rows >= 0]] == number).all()


def test_a_fifth_of_each_class_is_set_apart_for_good():
    names, labels = [f"{row}.png" for row in range(31)], ["a"] * 25 + ["b"] * 5 + ["c"]
    apart = set_apart(names, labels)
    assert [sum(one for one, label in zip(apart, labels, strict=True) if label == name) for name in "abc"] == [5, 1, 0]
    assert set_apart(names[::-1], labels[::-1])[::-1] == apart


def test_an_index_with_cells_finds_nearly_what_comparing_all_finds(tmp_path):
    vectors, queries = (directions(count, 16, seed, 50) for count, seed in ((MOST_COMPARED + 1, 1), (100, 2)))
    index = indexed(vectors, tmp_path / "index")
    rows, cosines = index.nearest(queries, 10)
    right = np.argsort(-(queries @ vectors.T), 1)[:, :10]
    assert np.mean([len(set(one) & set(other)) / 10 for one, other in zip(rows, right, strict=True)]) >= 0.95
    np.testing.assert_allclose(np.einsum("qkf,qf->qk", vectors[rows], queries), cosines, atol=1e-5)
    np.testing.assert_array_equal(index.vector(4321), vectors[4321])
    build_index(vectors, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "index").read_bytes()


PROGRAM = """
import os, sys, time
import numpy as np
from pathlib import Path
from hf_vicreg.explore.vector_index import VectorIndex
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
index = VectorIndex(folder / "index")
(folder / f"opened_{rank}").touch()
while len(list(folder.glob("opened_*"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)
maps = Path("/proc/self/maps")
assert not maps.exists() or str(folder / "index") in maps.read_text()
vectors = np.load(folder / "vectors.npy")
rows, cosines = index.nearest(vectors[:50], 3)
assert (rows[:, 0] == np.arange(50)).all(), rows
print(rows.sum(), index.vector(7)[:3])
"""


@pytest.mark.distributed
def test_several_processes_have_the_same_index_open(tmp_path, ranks):
    vectors = directions(500)
    np.save(tmp_path / "vectors.npy", vectors)
    build_index(vectors, tmp_path / "index")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = ranks(3, tmp_path / "program.py", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1
