"""Dense-masked against gathered-block attention, the two forms behind `sdpa`: what `prefers_blocks` rests on.

    python -m benchmarks.attention --out benchmarks/results/attention.json

Times the attention core, forward and backward, of both forms in alternating repetitions of one process and prints the
median of each and the median ratio.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from hf_vicreg.modeling.bigbird_attention import blocks_attention, dense_attention, prefers_blocks
from hf_vicreg.modeling.bigbird_pattern import tile_pattern

NUM_HEADS, HEAD_DIM = 6, 64
GRIDS = ((16, 16, 4), (24, 24, 4), (32, 32, 8), (32, 32, 4), (48, 48, 8), (64, 64, 8))  # rows, columns, tile


def seconds(attend, tensors, pattern) -> float:
    """Return the wall time of one forward and backward pass."""
    started = time.perf_counter()
    attend(*tensors, None, pattern=pattern, scaling=HEAD_DIM**-0.5).sum().backward()
    return time.perf_counter() - started


def measure(rows: int, columns: int, tile: int, repeats: int) -> dict:
    """Return medians in seconds and the median of dense / blocks for one grid, batch 1."""
    pattern = tile_pattern(rows, columns, tile_size=(tile, tile))
    tensors = [torch.randn(1, NUM_HEADS, pattern.num_tokens, HEAD_DIM, requires_grad=True) for _ in range(3)]
    times: dict[str, list[float]] = {"dense": [], "blocks": []}
    for _ in range(repeats + 1):  # the first repetition fills the caches
        for name, attend in (("dense", dense_attention), ("blocks", blocks_attention)):
            times[name].append(seconds(attend, tensors, pattern))
    dense, blocks = times["dense"][1:], times["blocks"][1:]
    return {
        "grid": f"{rows}x{columns}",
        "tile": tile,
        "tokens": pattern.num_tokens,
        "density": round(pattern.density, 3),
        "dense_s": round(statistics.median(dense), 4),
        "blocks_s": round(statistics.median(blocks), 4),
        "dense_over_blocks": round(statistics.median(a / b for a, b in zip(dense, blocks, strict=True)), 2),
        "sdpa_takes": "blocks" if prefers_blocks(pattern) else "dense",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = []
    for grid in GRIDS:
        table.append(measure(*grid, repeats=arguments.repeats))
        print("  ".join(f"{key} {value}" for key, value in table[-1].items()), flush=True)
    if arguments.out:
        result = {
            "command": "python -m benchmarks.attention " + " ".join(sys.argv[1:]),
            "machine": {
                "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "heads": [NUM_HEADS, HEAD_DIM],
            "rows": table,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
