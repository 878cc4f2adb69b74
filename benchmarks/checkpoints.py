"""What a checkpoint costs the step that follows it: written beside the training, and waited for.

    python -m benchmarks.checkpoints --out benchmarks/results/checkpoints.json

Two runs of the digits, the same but for that: an expander of 2,048, a checkpoint every tenth step of about 100 MB,
seconds of each step. Steps that begin beside a checkpoint against the median of the others.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.engine.loop import TrainingLoop
from hf_vicreg.training.engine.pretraining import pretraining_loop
from hf_vicreg.training.images.run_images import load_images
from hf_vicreg.training.launch.distributed import build_accelerator
from hf_vicreg.training.launch.signals import StopRequest
from hf_vicreg.training.run.resolve import resolve

EVERY = 10
SETTINGS = {
    "config": "digits",
    "batch_size": 64,
    "checkpointing_steps": EVERY,
    "logging_steps": 1000,
    "knn_every_epochs": 0,
    "vicreg": {"expander_sizes": [2048, 2048, 2048]},
}


class Timed(TrainingLoop):
    """A loop that notes when each step was counted, and waits for every checkpoint if told to."""

    waits: bool
    seconds: list[float]

    def _take(self, batches):
        started = time.perf_counter()
        taken = super()._take(batches)
        self.seconds.append(time.perf_counter() - started)
        return taken

    def _checkpoint(self, wait):
        started = time.perf_counter()
        super()._checkpoint(wait or self.waits)
        self.seconds[-1] += time.perf_counter() - started


def seconds_of_steps(waits: bool, steps: int) -> list[float]:
    """Return the seconds of each step, with what it waited for its checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        config = resolve(SETTINGS | {"max_steps": steps, "output_dir": scratch})
        accelerator = build_accelerator("no", device="cpu")
        source, _, _ = load_images(config)
        model = VicRegForPreTraining(config.vicreg)
        loop: Any = pretraining_loop(config, source, model, accelerator, None, StopRequest(Path(scratch), None))
        loop.__class__, loop.waits, loop.seconds = Timed, waits, []
        loop.fit()
    return loop.seconds


def main() -> None:
    """Measure both ways and print or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    found: dict = {"machine": machine("cpu"), "steps": arguments.steps, "every": EVERY}
    for name, waits in (("waited for", True), ("beside the training", False)):
        seconds = seconds_of_steps(waits, arguments.steps)[EVERY:-1]  # the last one is waited for
        # the step that makes a checkpoint, and the one beside whose work it is written
        making, beside = seconds[EVERY - 1 :: EVERY], seconds[::EVERY]
        others = [one for place, one in enumerate(seconds) if place % EVERY not in (0, EVERY - 1)]
        middle = statistics.median(others)
        found[name] = {
            "median_step_s": round(middle, 4),
            "making_it": round(statistics.median(making) / middle, 3),
            "beside_it": round(statistics.median(beside) / middle, 3),
        }
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
