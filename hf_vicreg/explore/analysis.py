"""What is told of a whole set at once, computed once and kept: index, neighbours, a map and clusters."""

import logging
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hf_vicreg.explore.finds import strangeness
from hf_vicreg.explore.image_set import ImageSet
from hf_vicreg.explore.vector_index import VectorIndex, build_index
from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.report.space import maps_of
from hf_vicreg.training.monitor.progress import Progress

logger = logging.getLogger(__name__)

VERSION = 3  # of what is kept; another one is computed anew
NEIGHBOURS = 10
MOST_FOR_TSNE = 2000  # images; it takes seconds so far
MOST_CLUSTERS = 20
CHUNK = 2000
INDEX, TABLES = "index.faiss", "tables.safetensors"


@dataclass(frozen=True)
class Analysis:
    """What was computed of a set of images.

    Attributes:
        index: Of their embeddings.
        maps: `(images, 2)` uint16 from 0 to 65535, by the map's name.
        neighbours: `(images, k)` int32, the rows nearest to each, itself left out.
        cosines: `(images, k)` float32, to these.
        clusters: `(images,)` int16, the largest cluster first.
        central: For each cluster the rows nearest to its centre.
        strange: `(images,)` float32, of `strangeness`.
    """

    index: VectorIndex
    maps: dict[str, np.ndarray]
    neighbours: np.ndarray
    cosines: np.ndarray
    clusters: np.ndarray
    central: list[list[int]]
    strange: np.ndarray


def analyse(images: ImageSet) -> Analysis:
    """Return the analysis of a set, from the cache where it is there; else it is computed, with progress, and kept.

    It lies in `hf_vicreg/explore` of `HF_HOME`, complete or absent, under a hash of the embeddings: several processes
    may ask for the same at once.
    """
    folder = Path(constants.HF_HOME) / "hf_vicreg" / "explore" / f"{images.key}-{VERSION}"
    if folder.is_dir():
        try:
            return _opened(folder)
        except (OSError, RuntimeError, SafetensorError, KeyError) as error:  # RuntimeError is faiss'
            logger.warning("%s is damaged and made again: %s", folder, one_line(str(error)))
            shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        _compute(images.embeddings(), images.inner_layers(), working)
        working.chmod(0o755)
        os.rename(working, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, with the same
            raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return _opened(folder)


def _compute(embeddings: np.ndarray, inner: list[np.ndarray], folder: Path) -> None:
    vectors = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    logger.info("%d images: index", len(vectors))
    build_index(vectors, folder / INDEX)
    neighbours, cosines = neighbours_of(VectorIndex(folder / INDEX), vectors)
    logger.info("%d images: map and clusters", len(vectors))
    clusters, central = clusters_of(vectors)
    maps = {f"map {name}": _whole_numbers(points) for name, points in _maps(vectors).items()}
    tables = {"neighbours": neighbours, "cosines": cosines, "clusters": clusters, "central": central}
    tables["strange"] = strangeness(*inner or [embeddings])
    save_file(tables | maps, folder / TABLES)


def _opened(folder: Path) -> Analysis:
    with safe_open(folder / TABLES, framework="np") as file:
        tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    maps = {name.removeprefix("map "): tables[name] for name in sorted(tables) if name.startswith("map ")}
    central = [[int(row) for row in rows if row >= 0] for rows in tables["central"]]
    index = VectorIndex(folder / INDEX)
    return Analysis(
        index, maps, tables["neighbours"], tables["cosines"], tables["clusters"], central, tables["strange"]
    )


def neighbours_of(index: VectorIndex, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest other rows of every row, `(images, k)` int32, and their cosines, float32."""
    count = min(NEIGHBOURS, len(vectors) - 1)
    found = np.zeros((len(vectors), count), np.int32), np.zeros((len(vectors), count), np.float32)
    progress = Progress(len(vectors), 0, shown=True, unit="image")
    progress.describe("neighbours found")
    for start in range(0, len(vectors), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(vectors)))
        near, cosines = index.nearest(vectors[rows], count + 1)
        own = near == rows[:, None]
        own[~own.any(1), -1] = True  # among more copies than were asked for it need not be: the last one goes
        near, cosines = np.where(near < 0, rows[:, None], near), np.where(near < 0, -1, cosines)  # none in its cells
        found[0][rows] = near[~own].reshape(len(rows), count)
        found[1][rows] = cosines[~own].reshape(len(rows), count)
        progress.update(int(rows[-1]) + 1)
    progress.close()
    return found


def clusters_of(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the cluster of every row, by k-means, and the 6 rows nearest to each centre.

    There are sqrt(images / 2) clusters, 2 to 20. Largest first.
    """
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    count = min(len(vectors), max(2, min(MOST_CLUSTERS, round(math.sqrt(len(vectors) / 2)))))
    with threadpool_limits(1):  # threads that wait for each other on busy cores
        means = MiniBatchKMeans(count, random_state=0, n_init=3, batch_size=4096).fit(vectors)
    sizes = np.bincount(means.labels_, minlength=count)
    order = [one for one in np.argsort(-sizes, kind="stable") if sizes[one]]
    number = np.zeros(count, np.int16)
    number[order] = np.arange(len(order))
    clusters = number[means.labels_]
    central = np.full((len(order), 6), -1, np.int32)
    for place, one in enumerate(order):
        rows = np.flatnonzero(clusters == place)
        far = np.linalg.norm(vectors[rows] - means.cluster_centers_[one], axis=1)
        nearest = rows[np.argsort(far, kind="stable")[:6]]
        central[place, : len(nearest)] = nearest
    return clusters, central


def _maps(vectors: np.ndarray) -> dict[str, torch.Tensor]:
    """Return maps in the unit square: with few images those of the report, else the PCA alone."""
    features = torch.from_numpy(vectors)
    if len(features) <= MOST_FOR_TSNE:
        return maps_of(features)
    # as maps_of, from the covariance: a decomposition of all rows would take minutes
    mean = features.double().mean(0)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in features.split(CHUNK):
        centred = part.double() - mean
        covariance += centred.T @ centred
    axes = torch.linalg.eigh(covariance).eigenvectors[:, -2:].flip(1)
    points = torch.cat([(part.double() - mean) @ axes for part in features.split(CHUNK)])
    # a few far ones shall not press the others together: they stand at the rim
    low, high = (torch.quantile(points[:: -(-len(points) // 100_000)], share, dim=0) for share in (0.001, 0.999))
    return {"PCA": ((points - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)}


def _whole_numbers(points: torch.Tensor) -> np.ndarray:
    return (points.clamp(0, 1) * 65535).round().numpy().astype(np.uint16)
