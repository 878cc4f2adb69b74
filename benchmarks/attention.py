"""Attention: ours against dense SDPA, masked SDPA and transformers' BigBird, in one run.

    python -m benchmarks.attention --out benchmarks/results/attention.json --plot benchmarks/results/attention.png

Batch 1, 6 heads of 64, tiles of 8x8 patches (`--tile`), 3 random tiles, one global token. `core` is queries, keys and
values to output; `layer` is projections, rotary positions (transformers' BigBird has none), core, output projection.
Methods take turns, so that a slow minute of the machine hits all of them; medians of seconds, and of ratios to dense
SDPA in the same turn. On a GPU: bf16, `dense` is the flash kernel, cuDNN's stands beside it. Extra memory is the peak
above inputs and module, each in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measuring import extra_memory, machine, step
from hf_vicreg.modeling.bigbird_attention import sdpa_attention
from hf_vicreg.modeling.bigbird_pattern import BlockPattern, block_pattern
from hf_vicreg.modeling.bigbird_positions import rotary_tables, with_global_tokens
from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
from hf_vicreg.modeling.dense_attention import dense_attention
from hf_vicreg.modeling.flex_block_attention import flex_block_attention
from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTAttention

TILE = (8, 8)
NUM_HEADS, HEAD_DIM = 6, 64
WIDTH = NUM_HEADS * HEAD_DIM
SIDES = (16, 24, 32, 45, 64, 128, 256)
BIGBIRD_SIDES = (64, 128)  # its block of 64 has to divide the tokens, and it needs a dozen of them
DENSE_UP_TO = 128 * 128
MEMORY_FROM_SIDE = 64
TIMEOUT_S = 1800


def pattern_of(side: int, *, full: bool = False) -> BlockPattern:
    """Return the pattern of a square grid, or the full one."""
    return block_pattern(side, side, tile_size=(side, side) if full else TILE, num_random_blocks=0 if full else 3)


def pinned(backend: SDPBackend, device: str, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return `function` with one kernel of torch's attention on a GPU, which fails rather than take another."""

    def run() -> torch.Tensor:
        with sdpa_kernel(backend) if device == "cuda" else nullcontext():
            return function()

    return run


def core(method: str, side: int, device: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Return a function that attends once; its result's gradient reaches queries, keys and values."""
    pattern = pattern_of(side)
    tokens = side * side if method == "bigbird" else pattern.num_tokens
    shape = (1, NUM_HEADS, tokens, HEAD_DIM)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    scaling = HEAD_DIM**-0.5
    if method in ("dense", "cudnn"):
        backend = SDPBackend.CUDNN_ATTENTION if method == "cudnn" else SDPBackend.FLASH_ATTENTION
        return pinned(backend, device, lambda: F.scaled_dot_product_attention(query, key, value))
    if method == "masked":
        return lambda: dense_attention(query, key, value, None, pattern=pattern, scaling=scaling)
    if method == "flex":
        return lambda: flex_block_attention(query, key, value, None, pattern=pattern, scaling=scaling)
    if method == "bigbird":
        peer, masks = bigbird(side * side, device, dtype)
        attend = peer.bigbird_block_sparse_attention
        sizes = (NUM_HEADS, 3, HEAD_DIM, 64, 64, 1, tokens, tokens)
        plan = {"plan_from_length": None, "plan_num_rand_blocks": None}
        return lambda: attend(query, key, value, *masks, *sizes, seed=0, **plan)[0]
    module = torch.nn.Identity()
    return lambda: sdpa_attention(module, query, key, value, None, pattern=pattern, scaling=scaling)[0]


def layer(method: str, side: int, device: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Return a function that runs a layer once; its result's gradient reaches inputs and weights."""
    if method == "bigbird":
        peer, masks = bigbird(side * side, device, dtype)
        output = torch.nn.Linear(WIDTH, WIDTH, device=device, dtype=dtype)
        tokens = torch.randn(1, side * side, WIDTH, device=device, dtype=dtype, requires_grad=True)
        return lambda: output(peer(tokens, *masks)[0])
    config = BigBirdViTConfig(hidden_size=WIDTH, num_attention_heads=NUM_HEADS)
    config._attn_implementation = "flex_attention" if method == "flex" else "sdpa"
    module = BigBirdViTAttention(config).to(device, dtype).train()
    pattern = pattern_of(side, full=method == "dense")
    cos, sin = rotary_tables(config.head_dim, config.rope_theta, None, side, side, torch.device(device))
    rotary = with_global_tokens((cos.to(dtype), sin.to(dtype)), pattern.num_global_tokens)
    tokens = torch.randn(1, pattern.num_tokens, WIDTH, device=device, dtype=dtype, requires_grad=True)
    if method == "dense":
        return pinned(SDPBackend.FLASH_ATTENTION, device, lambda: module(tokens, None, pattern, rotary)[0])
    return lambda: module(tokens, None, pattern, rotary)[0]


def bigbird(tokens: int, device: str, dtype: torch.dtype):
    """Return transformers' block-sparse layer in training mode (in evaluation it has no random links), and masks."""
    from transformers import BigBirdConfig, BigBirdModel
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = BigBirdConfig(hidden_size=WIDTH, num_attention_heads=NUM_HEADS, block_size=64, num_random_blocks=3)
    config.max_position_embeddings = tokens
    peer = BigBirdBlockSparseAttention(config, seed=0).to(device, dtype).train()
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(1, tokens, device=device, dtype=dtype), 64
    )
    return peer, (band, from_mask, to_mask, blocked, blocked)


KINDS = {"core": core, "layer": layer}


def methods_for(kind: str, side: int, device: str) -> list[str]:
    """Return what is measured at this size."""
    methods = ["ours"]
    if side * side <= DENSE_UP_TO:
        methods = ["dense", "ours"]
        if kind == "core":
            methods += ["masked", "cudnn"] if device == "cuda" else ["masked"]
    if side in BIGBIRD_SIDES:
        methods.append("bigbird")
    return methods + (["flex"] if device == "cuda" else [])


def measure_times(kind: str, side: int, repeats: int, device: str, dtype: torch.dtype) -> list[dict]:
    """Return a row for each method at one size."""
    methods = methods_for(kind, side, device)
    functions = {method: KINDS[kind](method, side, device, dtype) for method in methods}
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    for repeat in range(repeats + 1):
        for method in methods:
            if method == "bigbird" and repeat > min(2, repeats):
                continue
            times[method].append(step(functions[method], device))
    pattern = pattern_of(side)
    rows = []
    for method in methods:
        measured = times[method][1:] or times[method]  # the first turn fills caches
        row = {
            "kind": kind,
            "method": method,
            "tokens": side * side,
            "density": round(1.0 if method == "dense" else pattern.density, 4),
            "forward_s": round(statistics.median(one for one, _ in measured), 5),
            "forward_backward_s": round(statistics.median(both for _, both in measured), 5),
        }
        if "dense" in methods:
            base = times["dense"][1:] or times["dense"]
            pairs = list(zip(base, measured, strict=False))
            row["speedup_forward"] = round(statistics.median(a[0] / b[0] for a, b in pairs), 2)
            row["speedup_forward_backward"] = round(statistics.median(a[1] / b[1] for a, b in pairs), 2)
        rows.append(row)
    return rows


def measure_memory(kind: str, method: str, side: int, device: str, dtype: torch.dtype) -> int | None:
    """Return bytes of extra peak memory of one forward and backward pass; None where it cannot be read."""
    small = KINDS[kind](method, 16 if method != "bigbird" else 32, device, dtype)
    return extra_memory(KINDS[kind](method, side, device, dtype), small, device)


def in_child(*arguments: str) -> list | int | None:
    """Run this script on one measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.attention", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def draw(rows: list[dict], path: Path) -> None:
    """Write a plot of seconds over tokens, core and layer side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {
        "dense": ("dense SDPA", "tab:gray"),
        "cudnn": ("dense SDPA, cuDNN", "tab:brown"),
        "masked": ("masked SDPA", "tab:blue"),
        "ours": ("hf_vicreg (sdpa)", "tab:red"),
        "bigbird": ("transformers BigBird", "tab:orange"),
        "flex": ("hf_vicreg (flex_attention)", "tab:green"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        for method, (name, colour) in names.items():
            points = [
                (row["tokens"], row["forward_backward_s"])
                for row in rows
                if (row["kind"], row["method"]) == (kind, method)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name, color=colour)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{kind}, forward and backward")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    global TILE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="patches on a side of the grid")
    parser.add_argument("--repeats", type=int, default=7, help="turns below 16,384 tokens; three from there on")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tile", type=int, nargs=2, default=TILE, help="height and width of a tile in patches")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to write; needs matplotlib")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "KIND", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    TILE = tuple(arguments.tile)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    if arguments.child:
        what, kind, method = arguments.child
        side = arguments.sides[0]
        if what == "times":
            print(json.dumps(measure_times(kind, side, arguments.repeats, arguments.device, dtype)))
        else:
            print(json.dumps(measure_memory(kind, method, side, arguments.device, dtype)))
        return
    common = ["--device", arguments.device, "--threads", str(arguments.threads), "--tile", *map(str, TILE)]
    rows = []
    for kind in KINDS:
        for side in arguments.sides:
            repeats = str(arguments.repeats if side < 128 else 3)
            new = in_child(*common, "--sides", str(side), "--repeats", repeats, "--child", "times", kind, "all")
            assert isinstance(new, list)
            for row in new:
                if side >= MEMORY_FROM_SIDE:
                    extra = in_child(*common, "--sides", str(side), "--child", "memory", kind, row["method"])
                    row["extra_memory_mb"] = round(extra / 1e6, 1) if isinstance(extra, int) else None
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows += new
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": "python -m benchmarks.attention " + " ".join(sys.argv[1:]),
            "machine": machine(arguments.device),
            "dtype": str(dtype).removeprefix("torch."),
            "heads": NUM_HEADS,
            "head_dim": HEAD_DIM,
            "tile": list(TILE),
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
