"""What is found in a set: groups of near-duplicates, outliers, and labels that spread from a few to all."""

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from hf_vicreg.training.images.image_source import NOT_READ

TEMPERATURE = 0.07  # of the weight exp(cosine / temperature) of a link, as of the k-NN
ROUNDS, SETTLED = 50, 1e-3
MOST_FITTED, CHUNK = 50_000, 10_000  # rows of a covariance, and of a piece of the distances
TEST_SHARE = 5  # one of so many labelled images is set apart


@dataclass(frozen=True)
class Copies:
    """Near-duplicates.

    Attributes:
        groups: Rows, the closest group first.
        cosines: The largest cosine within each group.
        identical: Of each group, how many files there are to which another one is equal, byte for byte.
        usual: The median distance (1 - cosine) of an image from its nearest.
    """

    groups: list[list[int]]
    cosines: list[float]
    identical: list[int]
    usual: float


def find_copies(neighbours: np.ndarray, cosines: np.ndarray, digests: list[bytes], share: float) -> Copies:
    """Return groups of images that lie much nearer to each other than images of the set usually do.

    A pair counts if its distance, 1 - cosine, is at most `share` of the median distance from an image to its nearest,
    so that the measure fits any encoder. Groups are what such pairs join.

    Args:
        neighbours: `(images, k)` rows.
        cosines: `(images, k)`.
        digests: Of the images' bytes.
        share: 0 to 1.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if neighbours.shape[1] == 0:
        return Copies([], [], [], 0.0)
    usual = float(np.median(1 - cosines[:, 0]))
    row, place = np.nonzero(1 - cosines <= share * usual + 1e-6)
    other = neighbours[row, place]
    links = coo_matrix((np.ones(len(row), np.int8), (row, other)), shape=(len(neighbours),) * 2)
    _, part = connected_components(links, directed=False)
    members: dict[int, list[int]] = {}
    for one in np.unique(np.concatenate([row, other])).tolist():
        members.setdefault(int(part[one]), []).append(one)
    closest: dict[int, float] = {}
    for one, cosine in zip(part[row].tolist(), cosines[row, place].tolist(), strict=True):
        closest[one] = max(closest.get(one, -1.0), min(1.0, cosine))
    ordered = sorted(members, key=lambda one: (-closest[one], members[one]))
    groups = [members[one] for one in ordered]
    identical = []
    for group in groups:
        times = Counter(digests[one] for one in group)
        identical.append(sum(count for digest, count in times.items() if count > 1 and digest != NOT_READ))
    return Copies(groups, [closest[one] for one in ordered], identical, usual)


def strangeness(*layers: np.ndarray) -> np.ndarray:
    """Return how far each image lies from what is usual in the set, `(images,)` float32: about 1 is usual.

    It is the Mahalanobis distance from the mean, in units of the set's median, and its mean over several layers of
    the encoder. In directions in which the images hardly differ a small step is strange. An encoder that has never
    seen the like of an image often puts it among others, so that the distance to its neighbours says little; and what
    is odd about an image may be gone from the last layer, which has learned to ignore much. Source: Lee et al. 2018
    (arXiv 1807.03888), here one Gaussian for the set; its covariance is shrunk as Ledoit and Wolf 2004 do.

    Args:
        layers: `(images, features)` each, as the encoder gives them.
    """
    total = np.zeros(len(layers[0]), np.float32)
    for one in layers:
        total += _distance(one)
    return total / len(layers)


def _distance(embeddings: np.ndarray) -> np.ndarray:
    from sklearn.covariance import LedoitWolf
    from threadpoolctl import threadpool_limits

    count = len(embeddings)
    if count < 3:
        return np.zeros(count, np.float32)
    some = embeddings[:: -(-count // MOST_FITTED)].astype(np.float64)
    with threadpool_limits(1):  # threads that wait for each other on busy cores
        shape = LedoitWolf().fit(some)
    found = np.zeros(count, np.float32)
    for start in range(0, count, CHUNK):
        rows = slice(start, start + CHUNK)
        centred = embeddings[rows].astype(np.float64) - shape.location_
        squares = np.einsum("nd,nd->n", centred @ shape.precision_, centred)
        found[rows] = np.sqrt(np.maximum(squares, 0))
    usual = float(np.median(found))
    return found / usual if usual > 0 else found


def find_outliers(strange: np.ndarray, count: int) -> list[tuple[int, float]]:
    """Return the rows of the images that are the strangest by `strangeness`, and how strange, strangest first."""
    return [(int(row), float(strange[row])) for row in np.argsort(-strange, kind="stable")[:count]]


def spread_labels(
    neighbours: np.ndarray, cosines: np.ndarray, given: dict[int, int], classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the class of every image and how sure it is, from a few that are known.

    Source: Zhu and Ghahramani 2002, Learning from Labeled and Unlabeled Data with Label Propagation: labels flow
    along the links of the nearest neighbours, and the known ones are put back after each round.

    Args:
        neighbours: `(images, k)` rows.
        cosines: `(images, k)`.
        given: The class of each known row.
        classes: How many there are.

    Returns:
        `(images,)` int64, -1 where no label arrives, and `(images,)` float32, 0 to 1: its share of what arrives.
    """
    from scipy.sparse import csr_matrix, diags

    count, width = neighbours.shape
    weights = np.exp((cosines - 1) / TEMPERATURE).astype(np.float32).ravel()
    links = csr_matrix((weights, neighbours.ravel(), np.arange(count + 1) * width), shape=(count, count))
    links = links + links.T
    total = np.asarray(links.sum(1)).ravel()
    steps = diags(1 / np.maximum(total, 1e-30)) @ links
    rows = np.fromiter(given, np.int64, len(given))
    known = np.zeros((len(rows), classes), np.float32)
    known[np.arange(len(rows)), list(given.values())] = 1
    mass = np.zeros((count, classes), np.float32)
    mass[rows] = known
    for _ in range(ROUNDS):
        before, mass = mass, steps @ mass
        mass[rows] = known
        if np.abs(mass - before).max() < SETTLED:
            break
    arrived = mass.sum(1)
    best = mass.argmax(1)
    sure = mass[np.arange(count), best] / np.maximum(arrived, 1e-30)
    return np.where(arrived > 0, best, -1), np.where(arrived > 0, sure, 0).astype(np.float32)


def set_apart(names: list[str], labels: list[str]) -> list[bool]:
    """Return which images to test on: a fifth of each class, at least one of two, by a hash of their names."""
    by_class: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        by_class.setdefault(label, []).append(place)
    chosen = set()
    for places in by_class.values():
        order = sorted(places, key=lambda one: hashlib.sha256(names[one].encode(errors="surrogateescape")).digest())
        chosen |= set(order[: max(int(len(order) > 1), len(order) // TEST_SHARE)])
    return [place in chosen for place in range(len(names))]
