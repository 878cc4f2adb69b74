"""Crops a second and memory of training on huge images, against small ones: `python -m benchmarks.huge_images`.

Sparse files, a tiled TIFF and an OME-Zarr, in which few tiles are stored, are made in a temporary folder; each
size is read in a process of its own, since memory is measured as the process's peak.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TILE = 256


def tiles_of(side: int, share: float) -> Iterator[np.ndarray | None]:
    """Yield the tiles of a sparse image in raster order, None for one that holds nothing."""
    generator = np.random.default_rng(0)
    for place in range((-(-side // TILE)) ** 2):
        full = generator.random() < share or place == 0  # tifffile looks at the first
        yield generator.integers(0, 4096, (TILE, TILE), dtype=np.uint16) if full else None


def write_image(path: Path, side: int) -> None:
    """Write a sparse image with about 64 tiles that hold something, all of them where there are fewer."""
    share = min(1.0, 64 / (-(-side // TILE)) ** 2)
    if path.suffix == ".tif":
        import tifffile

        # uncompressed: tiles that are None are not stored, and a reader takes them for zeros
        with tifffile.TiffWriter(path, bigtiff=True) as file:
            shape = (side, side)
            file.write(tiles_of(side, share), shape=shape, dtype=np.uint16, tile=(TILE, TILE), compression="zlib")
        return
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=3)
    array = group.create_array("0", shape=(side, side), chunks=(TILE, TILE), dtype="uint16")
    across = -(-side // TILE)
    for place, tile in enumerate(tiles_of(side, share)):
        if tile is not None:
            top, left = place // across * TILE, place % across * TILE
            part = array[top : top + TILE, left : left + TILE]
            array[top : top + TILE, left : left + TILE] = tile[: part.shape[0], : part.shape[1]]
    axes = [{"name": "y"}, {"name": "x"}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}


def measure(folder: Path, window: int, steps: int) -> dict[str, float]:
    """Pretrain a tiny encoder for some steps; return crops a second of its loader and the peak memory in bytes."""
    from hf_vicreg import pretrain
    from hf_vicreg.training.images.channels.folders import channel_folder, without_blank
    from hf_vicreg.training.images.order import ViewDataset
    from hf_vicreg.training.images.views import ViewSampler
    from hf_vicreg.training.run.arguments import ViewsConfig

    began = time.perf_counter()
    source = without_blank(channel_folder(str(folder), 1, window=window), [0.0], [4095.0])
    opening = time.perf_counter() - began
    dataset = ViewDataset(source, ViewSampler.of_views(ViewsConfig(), (64, 64)), 0)
    for index in range(4):
        dataset[0, index % len(source)]
    began = time.perf_counter()
    for index in range(64):
        dataset[1, index % len(source)]
    seconds = time.perf_counter() - began
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    done = pretrain(
        out=folder.parent / f"run-{folder.name}",
        data=folder,
        model=sizes | {"num_channels": 1, "image_size": 64, "patch_size": 16},
        vicreg={"expander_sizes": [32, 32]},
        window=window,
        normalisation="fixed 0 4095",
        batch_size=4,
        max_steps=steps,
        device="cpu",
    )
    return {
        "windows": len(source),
        "opening_seconds": round(opening, 2),
        "crops_per_second": round(2 * 64 / seconds, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "steps": done.results["steps"],
    }


def main() -> None:
    """Write, measure and print; `--of` is for the processes that this one starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[1000, 40_000])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.of is not None:
        print(json.dumps(measure(arguments.of, arguments.window, arguments.steps)))
        return
    found = {"machine": platform.processor() or platform.machine(), "window": arguments.window, "results": []}
    with tempfile.TemporaryDirectory() as place:
        for suffix in (".tif", ".zarr"):
            for side in arguments.sides:
                folder = Path(place) / f"{suffix[1:]}-{side}"
                folder.mkdir()
                for number in range(4 if side < 5000 else 1):  # a batch of windows from small images, too
                    write_image(folder / f"{number}{suffix}", side)
                words = ["--of", str(folder), "--window", str(arguments.window), "--steps", str(arguments.steps)]
                command = [sys.executable, "-m", "benchmarks.huge_images", *words]
                finished = subprocess.run(command, check=True, capture_output=True, text=True)
                result = {"format": suffix, "side": side} | json.loads(finished.stdout.splitlines()[-1])
                print(json.dumps(result), flush=True)
                found["results"].append(result)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
