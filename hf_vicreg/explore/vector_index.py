"""The index of embeddings: a faiss index in one file that any number of processes map into their memory.

Up to 10,000 vectors all are compared (`IndexFlatIP`). Of more, vectors are sorted into cells, and a query is compared
with those of the cells nearest to it (`IndexIVFFlat`). docs/decisions/0012-vector-index.md has why.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_vicreg.training.monitor.progress import Progress

MOST_COMPARED = 10_000  # vectors without cells
CELLS = 2  # times the root of the number of vectors
SEARCHED, FEWEST_SEARCHED = 1 / 20, 40  # share of the cells, and how many at least
LEARNT = 50  # vectors a cell, from which the cells are learnt
CHUNK = 2000  # vectors between two words on progress


def build_index(vectors: np.ndarray, path: Path) -> None:
    """Write the index of some vectors `(images, features)` of length 1; the same vectors give the same index."""
    faiss = _faiss()
    count, features = vectors.shape
    if count <= MOST_COMPARED:
        index = faiss.IndexFlatIP(features)
    else:
        cells = round(CELLS * math.sqrt(count))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(features), features, cells, faiss.METRIC_INNER_PRODUCT)
        index.train(np.ascontiguousarray(vectors[:: max(1, count // (LEARNT * cells))]))
        index.nprobe = max(FEWEST_SEARCHED, math.ceil(SEARCHED * cells))
    progress = Progress(count, 0, shown=True, unit="image")
    progress.describe("indexed")
    for start in range(0, count, CHUNK):
        index.add(np.ascontiguousarray(vectors[start : start + CHUNK], np.float32))
        progress.update(min(count, start + CHUNK))
    progress.close()
    faiss.write_index(index, str(path))


class VectorIndex:
    """An index on the disk, opened to read: its pages are mapped, and shared with other processes that do so."""

    def __init__(self, path: Path):
        faiss = _faiss()
        self._index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        if isinstance(self._index, faiss.IndexIVF):
            self._index.make_direct_map()  # from a row to its place in a cell

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def vector(self, row: int) -> np.ndarray:
        """Return the embedding `(features,)` of a row."""
        return self._index.reconstruct(row)

    def nearest(self, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows that are nearest to some vectors, and their cosines, the nearest first.

        Args:
            vectors: `(queries, features)` of length 1.
            count: How many for each; fewer are found where there are fewer.

        Returns:
            `(queries, count)` int64 and float32; a row is -1 where the cells searched hold no more.
        """
        asked = np.ascontiguousarray(np.atleast_2d(vectors), np.float32)
        cosines, rows = self._index.search(asked, min(count, len(self)))
        return rows, cosines


def _faiss() -> Any:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())  # as many as the rest of this process takes
    return faiss
