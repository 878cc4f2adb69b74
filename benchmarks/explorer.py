"""The explorer with many images: its page in a browser, a query, and how much of what is right the index finds.

    python -m benchmarks.explorer --output benchmarks/results/explorer.json

Embeddings are those of `benchmarks.vector_index`, as a folder of `hf-vicreg embed` without images; the command serves
them in a process of its own, a first time, which computes, and a second time, which does not. Needs Chromium and its
driver. Times of the page are the browser's own, from the call of the address until the map can be used and until all
panels are filled; a frame is a drawing of the map while it moves, measured around the drawing alone.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from benchmarks.measuring import machine
from benchmarks.vector_index import NEAREST, made_up
from hf_vicreg.training.evaluation.features import DIGESTS
from hf_vicreg.training.run.places import EMBEDDING_FILE

ROWS_A_SHARD = 10_000


def write_folder(folder: Path, vectors: np.ndarray) -> None:
    """Write embeddings as `hf-vicreg embed` does, of images that are nowhere."""
    count, size = vectors.shape
    (folder / "data").mkdir(parents=True)
    shards = -(-count // ROWS_A_SHARD)
    for shard in range(shards):
        ids = range(shard * ROWS_A_SHARD, min(count, (shard + 1) * ROWS_A_SHARD))
        digests = b"".join(hashlib.sha256(str(one).encode()).digest()[:16] for one in ids)
        values = pyarrow.FixedSizeListArray.from_arrays(vectors[ids.start : ids.stop].reshape(-1), size)
        columns = {"id": pyarrow.array(ids, "int64"), "path": [f"{one:06d}.jpg" for one in ids], "embedding": values}
        table = pyarrow.table(columns).replace_schema_metadata({DIGESTS: digests.hex().encode()})
        pyarrow.parquet.write_table(table, folder / "data" / f"train-{shard:05d}-of-{shards:05d}.parquet")
    model = {"name": "made-up", "weights": "none", "feature": "none", "preprocessing": {}}
    images = {"name": "made-up", "num_images": count, "fingerprint": "none"}
    record = {"model": model, "images": images, "dtype": "float32", "size": size, "num_rows": count, "num_unusable": 0}
    (folder / EMBEDDING_FILE).write_text(json.dumps(record))


def started(folder: Path, home: Path) -> tuple[subprocess.Popen, str, float]:
    """Serve a folder; return the process, the address and the seconds until it was there."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "hf_vicreg.cli", "explore", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HOME": str(home)})
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found is not None
    return process, found[0], time.perf_counter() - began


def page_figures(address: str) -> dict[str, float]:
    """Return milliseconds until the page can be used, until it is full, and of a frame."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for one in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{one}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        browser.set_window_size(1280, 900)
        usable, ready, frames = [], [], []
        for _ in range(5):
            browser.get(address)
            WebDriverWait(browser, 120).until(lambda one: one.execute_script("return document.body.dataset.ready"))
            data = browser.execute_script("return [document.body.dataset.usable, document.body.dataset.ready]")
            usable.append(int(data[0]))
            ready.append(int(data[1]))
        script = (
            "const done = arguments[0], times = [], canvas = document.getElementById('canvas'); let turn = 0;"
            "const plain = app.drawn; let began = 0; app.drawn = (...all) => { times.push(performance.now() - began);"
            " plain(...all); };"
            "const step = () => { if (turn++ === 30) return done(times);"
            " canvas.dispatchEvent(new WheelEvent('wheel', {deltaY: turn < 15 ? -30 : 30, cancelable: true}));"
            " requestAnimationFrame(() => requestAnimationFrame(step)); };"
            "const raf = requestAnimationFrame;"
            "window.requestAnimationFrame = (act) => raf((at) => { began = performance.now(); act(at); }); step();"
        )
        frames = browser.execute_async_script(script)
    finally:
        browser.quit()
    return {
        "page_usable_ms": statistics.median(usable),
        "page_full_ms": statistics.median(ready),
        "frame_ms": round(statistics.median(frames), 1),
        "frame_ms_most": round(max(frames), 1),
    }


def query_figures(address: str, vectors: np.ndarray) -> dict[str, float]:
    """Return milliseconds of a query over HTTP, and the share of the ten nearest that are found."""
    rows = np.random.default_rng(3).integers(len(vectors), size=100)
    seconds, hits = [], 0
    for row in rows.tolist():
        began = time.perf_counter()
        with urllib.request.urlopen(f"{address}near/{row}?count={NEAREST}", timeout=60) as answer:
            found = {one for one, _ in json.load(answer)}
        seconds.append(time.perf_counter() - began)
        cosines = vectors @ vectors[row]
        cosines[row] = -2
        hits += len(found & set(np.argpartition(-cosines, NEAREST)[:NEAREST].tolist()))
    return {
        "query_ms": round(1000 * statistics.median(seconds), 1),
        "query_ms_95": round(1000 * sorted(seconds)[94], 1),
        "recall_at_10": round(hits / NEAREST / len(rows), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_vectors", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python -m benchmarks.explorer",
        "machine": machine("cpu"),
        "vectors": [arguments.num_vectors, arguments.dimensions],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder, home = Path(temporary) / "embeddings", Path(temporary) / "home"
        vectors = made_up(arguments.num_vectors, arguments.dimensions, 1)
        write_folder(folder, vectors)
        for name in ("first_start_s", "later_start_s"):
            process, address, seconds = started(folder, home)
            result[name] = round(seconds, 1)
            print(name, result[name], file=sys.stderr)
            try:
                if name == "later_start_s":
                    result |= query_figures(address, vectors) | page_figures(address)
            finally:
                process.terminate()
                process.wait(60)
    text = json.dumps(result, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
