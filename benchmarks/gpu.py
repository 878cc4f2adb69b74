"""Every check and measurement that needs a GPU, by one command of at most 25 minutes.

    python -m benchmarks.gpu --out runs/gpu --cifar10 CIFAR10_FOLDER

Each piece is a process of its own with a time limit: the tests marked `gpu`, attention and loss against their peers,
what masking saves, the way from files to steps, and for what is left of the time the recipe `cifar10_gpu`, which goes
on where it stopped. What came of a piece is written into `gpu.json` at once. The same command goes on with the pieces
that are not in it or did not end well. Exit code 0: all ended well; 1: some did not; 2: no GPU, or no peers.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
MINUTES, LEAST = 25, 2  # of the whole, and of training
STOPPED = 75  # the exit code of a run that its time ended, with a checkpoint
TAIL = 2000  # characters of what a piece said last


def pieces_of(out: Path, device: str) -> dict[str, tuple[float, list[str]]]:
    """Return most minutes and arguments of Python for each piece but the last, by its name."""
    measured = {
        "attention": (4, "attention", []),
        "vicreg_loss": (3, "vicreg_loss", ["--repeats", "3"]),
        "masked": (2, "masked", ["--bf16", "--batch_size", "16"]),
        "throughput": (3, "throughput", []),
    }
    pieces: dict[str, tuple[float, list[str]]] = {
        "tests": (6, ["-m", "pytest", "-q", "-p", "no:xdist", "-m", "gpu", "tests"])
    }
    for name, (minutes, module, flags) in measured.items():
        where = ["--device", device, "--out", str(out / f"{name}.json")]
        pieces[name] = (minutes, ["-m", f"benchmarks.{module}", *where, *flags])
    return pieces


def run_pieces(pieces: dict[str, tuple[float, list[str]]], out: Path, deadline: float) -> dict[str, Any]:
    """Run the pieces that have not ended well before, and return what is known of all.

    Args:
        pieces: Most minutes and arguments of Python by name.
        out: Folder of `gpu.json`, in which each piece has `code`, `seconds` and what it `said` last, and of the JSON
            files that pieces write, which become part of it.
        deadline: By `time.monotonic`; what has no time left is left for the next call.
    """
    path = out / "gpu.json"
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for name, (minutes, arguments) in pieces.items():
        left = min(60 * minutes, deadline - time.monotonic())
        if record.get(name, {}).get("code") == 0 or left <= 0:
            continue
        print(f"{name}: at most {left:.0f} s", file=sys.stderr, flush=True)
        started = time.monotonic()
        with (out / f"{name}.log").open("w+b") as log:
            process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=log)
            try:
                code: int | str = process.wait(left)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = "out of time"
            log.seek(0)
            said = log.read().decode(errors="replace")[-TAIL:]
        record[name] = {"code": code, "seconds": round(time.monotonic() - started, 1), "said": said}
        figures = out / f"{name}.json"
        if code == 0 and figures.is_file():
            record[name]["figures"] = json.loads(figures.read_text())
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(path)
        print(f"{name}: {code}, {record[name]['seconds']} s", file=sys.stderr, flush=True)
    return record


def main() -> int:
    """Run all pieces, then train; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found, new or of an earlier call")
    parser.add_argument("--cifar10", help="images for `cifar10_gpu`, a `datasets` folder or Hub id; default: none")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of the whole (default: {MINUTES})")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        error = "`cuda`: expected a GPU that torch can use, found none; run this on a machine with one."
        print(f"error: {error}", file=sys.stderr)
        return 2
    if importlib.util.find_spec("lightly") is None:
        print(
            "error: `lightly`: expected the peer to measure against; pip install -e '.[benchmarks]'.", file=sys.stderr
        )
        return 2
    deadline = time.monotonic() + 60 * asked.minutes
    out = asked.out.resolve()
    pieces = {"machine": (1, ["-c", _DESCRIBE, str(out / "machine.json")]), **pieces_of(out, "cuda")}
    record = run_pieces(pieces, out, deadline)
    left = (deadline - time.monotonic()) / 60
    if asked.cifar10 and left >= LEAST:
        run = ["--config", "cifar10_gpu", "--output_dir", str(out / "cifar10_gpu"), "--max_time", f"{left - 1:.2f}"]
        words = ["-m", "hf_vicreg.cli", "pretrain", asked.cifar10, *run, "--resume_from_checkpoint", "latest"]
        record = run_pieces({"cifar10_gpu": (left, words)}, out, deadline)
    codes = {name: one["code"] for name, one in record.items()}
    print(json.dumps(codes, indent=1))
    return int(any(code not in (0, STOPPED) for code in codes.values()) or codes.keys() < pieces.keys())


_DESCRIBE = (
    "import json, sys; from benchmarks.measuring import machine; "
    "open(sys.argv[1], 'w').write(json.dumps(machine('cuda')))"
)


if __name__ == "__main__":
    sys.exit(main())
