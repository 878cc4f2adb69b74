"""Libraries for the index of `hf-vicreg explore`: build, file, opening, memory, query, recall@10, side by side.

    python -m benchmarks.vector_index --output benchmarks/results/vector_index.json

Needs faiss-cpu, usearch and lancedb. Vectors are made up: 2,000 clouds in 24 dimensions, turned and bent into as many
as asked for, and noise over all. Queries are new points of the same clouds; what is right is found by comparing with
every vector. Each library builds in one process and is opened in another, as the explorer does it; memory is that of
the second one, above the same process before it opened anything: all of it, and without pages of the file, which the
system shares between processes and can take back. Queries go one at a time, on one thread. CPU seconds of a build are
what a busy machine disturbs least.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import machine, resident

CLOUDS, LATENT, QUERIES, NEAREST, BATCH = 2000, 24, 200, 10, 5000
NAMES = ("exact", "faiss_hnsw", "faiss_ivf", "usearch_f32", "usearch_f16", "lancedb_ivf_hnsw_sq", "lancedb_ivf_pq")


def made_up(count: int, dimensions: int, seed: int) -> np.ndarray:
    """Return `(count, dimensions)` float32 of length 1; the clouds are the same for every seed."""
    world = np.random.default_rng(0)
    centres = world.standard_normal((CLOUDS, LATENT), np.float32)
    turn = world.standard_normal((LATENT, dimensions), np.float32) / LATENT**0.5
    generator = np.random.default_rng(seed)
    found = np.empty((count, dimensions), np.float32)
    for start in range(0, count, 50_000):
        rows = min(50_000, count - start)
        inner = centres[generator.integers(CLOUDS, size=rows)]
        inner = inner + 0.5 * generator.standard_normal((rows, LATENT), np.float32)
        noise = 0.05 * generator.standard_normal((rows, dimensions), np.float32)
        part = np.tanh(inner @ turn) + noise
        found[start : start + rows] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return found


def build(name: str, vectors: np.ndarray, folder: Path) -> None:
    """Build the index of a library and leave it in a folder."""
    count, dimensions = vectors.shape
    if name == "exact":
        np.save(folder / "vectors.npy", vectors)
    elif name.startswith("faiss"):
        import faiss

        index: Any
        if name == "faiss_hnsw":
            index = faiss.IndexHNSWFlat(dimensions, 16, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = 128
        else:
            coarse = faiss.IndexFlatIP(dimensions)
            index = faiss.IndexIVFFlat(coarse, dimensions, round(2 * count**0.5), faiss.METRIC_INNER_PRODUCT)
            index.train(vectors[:: max(1, count // 100_000)])
        index.add(vectors)
        faiss.write_index(index, str(folder / "index"))
    elif name.startswith("usearch"):
        from usearch.index import Index

        index = Index(ndim=dimensions, metric="cos", dtype=name[-3:], connectivity=16, expansion_add=128)
        index.add(np.arange(count), vectors)
        index.save(str(folder / "index"))
    else:
        import lancedb
        import pyarrow

        lists = pyarrow.FixedSizeListArray.from_arrays(vectors.reshape(-1), dimensions)
        table = lancedb.connect(folder).create_table(
            "images", pyarrow.table({"id": np.arange(count), "vector": lists})
        )
        table.create_index(
            metric="cosine", vector_column_name="vector", index_type=name.removeprefix("lancedb_").upper()
        )


def opened(name: str, folder: Path) -> Any:
    """Return a function from one query `(dimensions,)` to the places of its nearest, of an index that was built."""
    if name == "exact":
        vectors = np.load(folder / "vectors.npy", mmap_mode="r")

        def exact(query: np.ndarray) -> np.ndarray:
            cosines = vectors @ query
            nearest = np.argpartition(-cosines, NEAREST)[:NEAREST]
            return nearest[np.argsort(-cosines[nearest])]

        return exact
    if name.startswith("faiss"):
        import faiss

        faiss.omp_set_num_threads(1)
        index: Any = faiss.read_index(str(folder / "index"), faiss.IO_FLAG_MMAP_IFC)
        if name == "faiss_hnsw":
            index.hnsw.efSearch = 96
        else:
            index.nprobe = max(40, index.nlist // 20)
        return lambda query: index.search(query[None], NEAREST)[1][0]
    if name.startswith("usearch"):
        from usearch.index import Index

        found = Index.restore(str(folder / "index"), view=True, expansion_search=96)
        assert found is not None
        found.expansion_search = 96
        return lambda query: found.search(query, NEAREST, threads=1).keys
    import lancedb

    table = lancedb.connect(folder).open_table("images")

    def of_lance(query: np.ndarray) -> list[int]:
        search = table.search(query).metric("cosine").limit(NEAREST).nprobes(20).refine_factor(5)
        return search.select(["id"]).to_arrow()["id"].to_pylist()

    return of_lance


def measure(name: str, folder: Path, work: Path) -> dict[str, float]:
    """Return what an index costs to open and to ask, and how much of what is right it finds."""
    queries, right = np.load(work / "queries.npy"), np.load(work / "right.npy")
    if name.startswith("faiss"):
        import faiss  # noqa: F401 - what the library itself takes is none of the index's memory
    elif name.startswith("usearch"):
        import usearch.index  # noqa: F401
    elif name.startswith("lancedb"):
        import lancedb  # noqa: F401
    before, before_own = resident("VmRSS"), resident("RssAnon")
    started = time.perf_counter()
    ask = opened(name, folder)
    ask(queries[0])
    ready = time.perf_counter() - started
    seconds, hits = [], 0
    for query, nearest in zip(queries, right, strict=True):
        started = time.perf_counter()
        found = ask(query)
        seconds.append(time.perf_counter() - started)
        hits += len(set(map(int, found)) & set(nearest.tolist()))
    return {
        "open_s": round(ready, 3),
        "query_ms": round(1000 * statistics.median(seconds), 2),
        "query_ms_95": round(1000 * sorted(seconds)[int(0.95 * len(seconds))], 2),
        "recall_at_10": round(hits / right.size, 4),
        "memory_mb": round((resident("VmRSS") - before) / 2**20),
        "own_memory_mb": round((resident("RssAnon") - before_own) / 2**20),
    }


def work_alone(arguments: argparse.Namespace) -> None:
    """Do one step of one library, in a process of its own; print what it took."""
    work, folder = arguments.work, arguments.work / arguments.only
    if arguments.measure:
        print(json.dumps(measure(arguments.only, folder, work)))
        return
    folder.mkdir()
    vectors = np.load(work / "vectors.npy")
    before, cpu, started = resident("VmRSS"), time.process_time(), time.perf_counter()
    build(arguments.only, vectors, folder)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    peak = (resident("VmHWM") - before) / 2**20
    found = {"build_s": round(seconds, 1), "build_cpu_s": round(cpu_seconds, 1), "build_peak_mb": round(peak)}
    print(json.dumps(found | {"file_mb": round(size / 2**20)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_vectors", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--output", type=Path, help="JSON file; entries of other sizes in it stay")
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        work_alone(arguments)
        return
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        vectors = made_up(arguments.num_vectors, arguments.dimensions, 1)
        queries = made_up(QUERIES, arguments.dimensions, 2)
        cosines = queries @ vectors.T
        np.save(work / "vectors.npy", vectors)
        np.save(work / "queries.npy", queries)
        np.save(work / "right.npy", np.argsort(-cosines, axis=1)[:, :NEAREST])
        del vectors, cosines
        for name in arguments.names:
            command = [sys.executable, "-m", "benchmarks.vector_index", "--only", name, "--work", str(work)]
            rows[name] = {}
            for step in ([], ["--measure"]):
                environment = os.environ | ({"OMP_NUM_THREADS": "1"} if step else {})
                done = subprocess.run([*command, *step], capture_output=True, text=True, timeout=3000, env=environment)
                if done.returncode:
                    rows[name]["failed"] = done.stderr.strip().splitlines()[-1][:200]
                    break
                rows[name] |= json.loads(done.stdout.strip().splitlines()[-1])
            print(name, rows[name], file=sys.stderr, flush=True)
            for path in sorted((work / name).rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
    entry = {
        "command": "python -m benchmarks.vector_index "
        f"--num_vectors {arguments.num_vectors} --dimensions {arguments.dimensions}",
        "machine": machine("cpu"),
        "rows": rows,
    }
    size = f"{arguments.num_vectors}x{arguments.dimensions}"
    stored = json.loads(arguments.output.read_text()) if arguments.output and arguments.output.exists() else {}
    text = json.dumps(stored | {size: entry}, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
