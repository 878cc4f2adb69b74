"""VICReg loss: ours against lightly's, the official formula and the plain dual form, in one run.

    python -m benchmarks.vicreg_loss --out benchmarks/results/vicreg_loss.json \\
        --plot benchmarks/results/vicreg_loss.png

Forward and backward of one batch of embeddings of two views, fp32. `official` is the authors' formula written out,
D x D; `dual` is the off-diagonal sum from the N x N Gram matrix, left to autograd. Methods take turns, so that a slow
minute of the machine hits all of them; medians of seconds, and of ratios to lightly in the same turn. Extra memory is
the peak above the inputs, each in a process of its own. `--processes 2` splits the batch over processes of one thread
each: ours against the official way, which gathers with gradient and computes everything on every process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.measuring import extra_memory, machine, step
from hf_vicreg import vicreg_loss

SHAPES = [(num_samples, dimensions) for dimensions in (2048, 8192) for num_samples in (256, 1024, 2048)]
TIMEOUT_S = 1800


def embeddings(num_samples: int, dimensions: int, device: str) -> list[torch.Tensor]:
    """Return two views `(num_samples, dimensions)`, alike and less spread than the target."""
    torch.manual_seed(0)
    first = 0.7 * torch.randn(num_samples, dimensions, device=device)
    return [(first + 0.3 * torch.randn_like(first)).requires_grad_() for _ in range(2)]


def official(z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
    """The authors' formula: D x D covariances, off-diagonal squares over D."""
    num_samples, dimensions = z_a.shape
    loss = 25 * F.mse_loss(z_a, z_b)
    for z in (z_a, z_b):
        z = z - z.mean(0)
        loss = loss + 25 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        covariance = z.T @ z / (num_samples - 1)
        off_diagonal = covariance.flatten()[:-1].view(dimensions - 1, dimensions + 1)[:, 1:]
        loss = loss + off_diagonal.square().sum() / dimensions
    return loss


def dual(z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
    """The same from the N x N Gram matrix."""
    num_samples, dimensions = z_a.shape
    loss = 25 * F.mse_loss(z_a, z_b)
    for z in (z_a, z_b):
        z = z - z.mean(0)
        variance = z.square().sum(0) / (num_samples - 1)
        loss = loss + 25 * F.relu(1 - (variance + 1e-4).sqrt()).mean() / 2
        gram = z @ z.T
        loss = loss + (gram.square().sum() / (num_samples - 1) ** 2 - variance.square().sum()) / dimensions
    return loss


def lightly(z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
    """lightly's `VICRegLoss`."""
    from lightly.loss import VICRegLoss

    return VICRegLoss()(z_a, z_b)


METHODS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "ours": lambda z_a, z_b: vicreg_loss(z_a, z_b).loss,
    "lightly": lightly,
    "official": official,
    "dual": dual,
}


def measure_times(shape: tuple[int, int], repeats: int, device: str) -> list[dict]:
    """Return a row for each method, and the largest difference of its gradient from the official formula's."""
    leaves = embeddings(*shape, device)
    functions = {name: (lambda method=method: method(*leaves)) for name, method in METHODS.items()}
    wanted = torch.cat(torch.autograd.grad(official(*(one.double() for one in leaves)), leaves)).double()
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            times[name].append(step(function, device)[1])
    rows = []
    for name, function in functions.items():
        found = torch.cat(torch.autograd.grad(function(), leaves)).double()
        pairs = list(zip(times["lightly"][1:], times[name][1:], strict=True))  # the first turn fills caches
        rows.append(
            {
                "method": name,
                "num_samples": shape[0],
                "dimensions": shape[1],
                "seconds": round(statistics.median(times[name][1:]), 5),
                "times_lightly": round(statistics.median(base / own for base, own in pairs), 2),
                "gradient_error": float(f"{((found - wanted).norm() / wanted.norm()).item():.1e}"),
            }
        )
    return rows


def measure_memory(method: str, shape: tuple[int, int], device: str) -> int | None:
    """Return bytes of extra peak memory, the gradients of the embeddings included."""
    leaves, small = embeddings(*shape, device), embeddings(16, 64, device)
    return extra_memory(lambda: METHODS[method](*leaves), lambda: METHODS[method](*small), device)


class GatherWithGradient(torch.autograd.Function):
    """All shares on every process; the gradient is summed over processes, as in the authors' code."""

    @staticmethod
    def forward(ctx, share):
        shares = share.new_empty(dist.get_world_size() * len(share), share.shape[1])
        dist.all_gather(list(shares.chunk(dist.get_world_size())), share.contiguous())
        return shares

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def measure_processes(shape: tuple[int, int], repeats: int) -> list[dict]:
    """Return rows of ours and the official way over the processes of this group."""
    dist.init_process_group("gloo")
    leaves = [
        one.detach().chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
        for one in embeddings(*shape, "cpu")
    ]
    functions = {
        "ours": lambda: vicreg_loss(*leaves, process_group=dist.group.WORLD).loss,
        "official": lambda: official(*(GatherWithGradient.apply(one) for one in leaves)),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            dist.barrier()
            started = time.perf_counter()
            step(function, "cpu")
            dist.barrier()
            times[name].append(time.perf_counter() - started)
    pairs = list(zip(times["official"][1:], times["ours"][1:], strict=True))
    rows = [
        {
            "method": name,
            "processes": dist.get_world_size(),
            "num_samples": shape[0],
            "dimensions": shape[1],
            "seconds": round(statistics.median(own[1:]), 5),
        }
        for name, own in times.items()
    ]
    rows[0]["times_official"] = round(statistics.median(base / own for base, own in pairs), 2)
    dist.barrier()
    dist.destroy_process_group()
    return rows


def in_child(arguments: list[str], processes: int = 1) -> list | int | None:
    """Run this script on one measurement in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "benchmarks.vicreg_loss", *arguments]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if processes > 1 else {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith(("[", "null")) or line.isdigit())
    )


def draw(rows: list[dict], path: Path) -> None:
    """Write a plot of seconds and extra memory over N, one column a width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {
        "ours": ("hf_vicreg", "tab:red"),
        "lightly": ("lightly", "tab:blue"),
        "official": ("official formula", "tab:gray"),
        "dual": ("dual form, autograd", "tab:orange"),
    }
    widths = sorted({row["dimensions"] for row in rows})
    figure, axes = plt.subplots(2, len(widths), figsize=(5 * len(widths), 7), squeeze=False, constrained_layout=True)
    for column, width in enumerate(widths):
        for line, (field, label) in enumerate((("seconds", "seconds"), ("extra_memory_mb", "extra memory, MB"))):
            axis = axes[line][column]
            for method, (name, colour) in names.items():
                points = [
                    (row["num_samples"], row[field])
                    for row in rows
                    if (row["method"], row["dimensions"]) == (method, width)
                    and row.get(field)
                    and "processes" not in row
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=name, color=colour)
            axis.set(xscale="log", yscale="log", xlabel="N", ylabel=label, title=f"D = {width:,}")
            axis.set_xticks(sorted({row["num_samples"] for row in rows}), minor=False)
            axis.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
            axis.get_xaxis().set_minor_formatter(matplotlib.ticker.NullFormatter())
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--num_samples", type=int, nargs="+", default=sorted({one for one, _ in SHAPES}))
    parser.add_argument("--dimensions", type=int, nargs="+", default=sorted({one for _, one in SHAPES}))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2, help="processes of the second part; 1 leaves it out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to write; needs matplotlib")
    parser.add_argument("--child", metavar="WHAT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (arguments.num_samples[0], arguments.dimensions[0])
    if arguments.child == "processes":
        rows = measure_processes(shape, arguments.repeats)
        if int(os.environ["RANK"]) == 0:
            print(json.dumps(rows))
        return
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        times = arguments.child == "times"
        found = (
            measure_times(shape, arguments.repeats, arguments.device)
            if times
            else measure_memory(arguments.child, shape, arguments.device)
        )
        print(json.dumps(found))
        return
    common = ["--device", arguments.device, "--threads", str(arguments.threads), "--repeats", str(arguments.repeats)]
    result: list[dict] = []
    for dimensions in arguments.dimensions:
        for num_samples in arguments.num_samples:
            sized = [*common, "--num_samples", str(num_samples), "--dimensions", str(dimensions)]
            new = in_child([*sized, "--child", "times"])
            assert isinstance(new, list)
            for row in new:
                extra = in_child([*sized, "--child", row["method"]])
                assert not isinstance(extra, list)
                row["extra_memory_mb"] = None if extra is None else round(extra / 1e6, 1)
            if arguments.processes > 1 and arguments.device == "cpu":
                several = in_child([*sized, "--child", "processes"], arguments.processes)
                assert isinstance(several, list)
                new += several
            for row in new:
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            result += new
    if arguments.out:
        from importlib.metadata import version

        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": "python -m benchmarks.vicreg_loss " + " ".join(sys.argv[1:]),
            "machine": machine(arguments.device) | {"lightly": version("lightly")},
            "rows": result,
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        draw(result, arguments.plot)


if __name__ == "__main__":
    main()
