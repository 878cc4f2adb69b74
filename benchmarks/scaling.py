"""How much of their speed several processes keep: measured on CPU cores, and by a model on 8 to 512 GPUs.

    python -m benchmarks.scaling --out benchmarks/results/scaling.json

Measured: the digits' encoder with a batch of 128 for each process, one core for each, images a second of all against
as many times those of one. Runs take turns, and the median of the ratios counts.

The model: a step computes, then averages gradients, for which nothing else waits (decision 8), and exchanges what the
loss needs. A ring of n devices passes each byte of a sum 2 (n - 1) / n times over its slowest link, and each byte that
is gathered (n - 1) / n times. Latency, waiting for the slowest, and reading images are left out: it is an upper bound.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import machine
from hf_vicreg import BigBirdViTConfig, BigBirdViTModel

ROOT = Path(__file__).resolve().parents[1]
BATCH, STEPS = 128, 40
FLOPS = 400e12  # that a GPU achieves in bf16, two fifths of an H100's peak
INSIDE = 360e9  # bytes a second of a ring within a machine of 8, four fifths of NVLink's
# the same between machines, four fifths of what their cards can: one of 400 Gbit/s a GPU, or one of 100 Gbit/s for all
BETWEEN = {"eight cards of 400 Gbit/s": 320e9, "one card of 100 Gbit/s": 10e9}
IN_MACHINE = 8
GPUS = (8, 16, 64, 128, 512)
SIZES = {
    "ViT-S/16": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "ViT-B/16": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "ViT-L/16": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
EXPANDER, OWN_BATCH = 8192, 128  # its width, and images of one GPU


def measured(processes: int) -> float:
    """Return the images a second of a run of so many processes with a core each."""
    cores = sorted(os.sched_getaffinity(0))[:processes]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = ["--config", "digits", "--output_dir", out, "--max_steps", STEPS, "--knn_every_epochs", 0]
        flags += ["--batch_size", BATCH * processes, "--num_processes", processes]
        command = [sys.executable, "-m", "hf_vicreg.cli", "pretrain", "digits", *flags]
        subprocess.run(
            [str(one) for one in command],
            check=True,
            cwd=ROOT,
            timeout=600,
            capture_output=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        results = json.loads((out / "results.json").read_text())
    return results["steps"] * BATCH * processes / results["training_seconds"]


def efficiencies(counts: list[int], turns: int) -> list[dict[str, Any]]:
    """Return for each number of processes the share of its speed that a process keeps, the median over the turns."""
    rates = [{count: measured(count) for count in counts} for _ in range(turns)]
    rows = []
    for count in counts[1:]:
        kept = [one[count] / (count / counts[0] * one[counts[0]]) for one in rates]
        rows.append(
            {
                "processes": count,
                "efficiency": round(statistics.median(kept), 3),
                "turns": [round(one, 3) for one in kept],
                "images_a_second": round(statistics.median(one[count] for one in rates), 1),
            }
        )
    return rows


def modelled(name: str, gpus: int, network: str) -> dict[str, Any]:
    """Return what a step of VICReg takes by the model, in milliseconds, and the share in which it computes."""
    flops, parameters = _step_flops(name)
    link = INSIDE if gpus <= IN_MACHINE else BETWEEN[network]
    ring = (gpus - 1) / gpus
    images = gpus * OWN_BATCH
    gradients = 2 * ring * 4 * parameters / link
    # the smaller of the two: embeddings of both views, gathered, or their covariances, summed
    gathered, summed = ring * 2 * 4 * images * EXPANDER / link, 2 * ring * 2 * 4 * EXPANDER**2 / link
    loss = gathered if images < EXPANDER else summed
    statistics_flops = 2 * 2 * 2 * OWN_BATCH * min(images, EXPANDER) * EXPANDER
    compute = flops * OWN_BATCH / FLOPS + statistics_flops / (FLOPS / 10)  # in full precision
    whole = compute + gradients + loss
    return {
        "encoder": name,
        "gpus": gpus,
        "network": network if gpus > IN_MACHINE else "NVLink",
        "compute_ms": round(1000 * compute, 1),
        "gradients_ms": round(1000 * gradients, 1),
        "loss_ms": round(1000 * loss, 1),
        "efficiency": round(compute / whole, 3),
        "images_a_second": round(images / whole),
    }


def _step_flops(name: str) -> tuple[int, int]:
    """Return the FLOPs of both views of an image, forward and backward, expander included, and all parameters."""
    with torch.device("meta"):
        encoder = BigBirdViTModel(BigBirdViTConfig(**SIZES[name], image_size=224, attention_type="original_full"))
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, 3, 224, 224))
    width = SIZES[name]["hidden_size"]
    expander = width * EXPANDER + 2 * EXPANDER**2
    parameters = sum(one.numel() for one in encoder.parameters()) + expander
    return 2 * 3 * (counter.get_total_flops() + 2 * expander), parameters


def main() -> None:
    """Measure, compute, and write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 4], help="those beyond the cores are left out"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    asked = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    counts = [one for one in sorted(asked.processes) if one <= cores]
    rows = efficiencies(counts, asked.turns) if len(counts) > 1 else []
    networks = [(gpus, one) for gpus in GPUS for one in (BETWEEN if gpus > IN_MACHINE else list(BETWEEN)[:1])]
    model = [modelled(name, *where) for name in SIZES for where in networks]
    assumed = {"flops": FLOPS, "inside": INSIDE, "between": BETWEEN, "batch": OWN_BATCH, "expander": EXPANDER}
    found = {"machine": machine("cpu"), "cores": cores, "measured": rows, "assumed": assumed, "model": model}
    asked.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in [*rows, *model]:
        print(row)
    assert all(math.isfinite(one["efficiency"]) for one in [*rows, *model])


if __name__ == "__main__":
    main()
