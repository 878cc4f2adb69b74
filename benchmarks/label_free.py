"""Which figure without labels agrees with k-NN: short runs with drawn settings, and rank correlations over them.

    python -m benchmarks.label_free cifar10 --config cifar10_cpu --steps 400 --folder runs/label_free \\
        --out benchmarks/results/label_free.json

Each run is `hf-vicreg pretrain` of the recipe with learning rate, crops and covariance weight drawn from wide ranges (
a Latin hypercube; the first run has the recipe's own), so that some go well and some badly. Of each encoder: the 20-NN
accuracy on held-out images, and the figures of `hf_vicreg.training.monitor.label_free` on the same 8 views of the same
512 training images, those of the recipe. Spearman's rank correlation with the accuracy over all runs, of figures of
which less is better with the other sign: 1 is perfect agreement. The same command goes on where it was stopped.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measuring import machine
from hf_vicreg.comparison.trials import STOPPED, finished, flags_of, judged_apart, record_in, trained_apart, write
from hf_vicreg.training.errors import InputError, log_to_stderr, tell
from hf_vicreg.training.monitor.label_free import BETTER
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.run.settings import explicit_settings
from hf_vicreg.tuning.command import with_values
from hf_vicreg.tuning.halving import drawn
from hf_vicreg.tuning.runs import space_of

RANGES = {
    "learning_rate": [3e-5, 3e-2],
    "views.crop_min_ratio": [0.05, 0.9],
    "vicreg.covariance_weight": [0.04, 25.0],
}
FILE = "label_free.json"


def ranks_of(values: list[float]) -> list[float]:
    """Return the rank of each value, from 1 on; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def spearman(one: list[float], other: list[float]) -> float | None:
    """Return the correlation of ranks; None where all values of either are equal."""
    if min(len(set(one)), len(set(other))) < 2:
        return None
    return statistics.correlation(ranks_of(one), ranks_of(other))


def measured(asked: dict[str, Any], folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Train and judge what is not there yet; return what there is, and the exit code of a run that was stopped."""
    record = record_in(folder, FILE, asked, "benchmark", {"runs"})
    base = folder / "base.yaml"
    if record is None:
        config = resolve(asked["settings"] | {"output_dir": str(folder)})
        _, first = space_of({"search": RANGES}, config.to_recipe())
        space = {key: (low, high) for key, (low, high) in RANGES.items()}
        record = {"asked": asked, "runs": drawn(space, first, asked["runs"], asked["seed"])}
        folder.mkdir(parents=True, exist_ok=True)
        write(base, yaml.safe_dump(asked["settings"]))
        write(folder / FILE, json.dumps(record))
    found: list[dict[str, Any]] = []
    for number, values in enumerate(record["runs"]):
        run, recipe = folder / f"run{number:02d}", folder / f"run{number:02d}.yaml"
        write(recipe, yaml.safe_dump(with_values(asked["settings"], values)))
        code = 0 if finished(run) else trained_apart(flags_of(recipe, run, asked["seed"]))
        figures = code or judged_apart(base, run)
        if isinstance(figures, int):
            if figures in STOPPED:
                return found, figures
            found.append({"values": values, "failed": figures})
            continue
        accuracy = (finished(run).get("knn_accuracy") or {}).get("trained")
        if accuracy is None:
            raise InputError("`data`: expected labels of training and held-out images, found none to measure k-NN on.")
        found.append({"values": values, "knn": accuracy, "figures": figures})
        print(f"run {number}: {values}, 20-NN {accuracy:.3f}", file=sys.stderr)
    return found, 0


def main() -> int:
    """Measure, and print or write JSON; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="as of `hf-vicreg pretrain`, with labels and a held-out split")
    parser.add_argument("--config", default="cifar10_cpu", help="recipe of every run (default: cifar10_cpu)")
    parser.add_argument("--runs", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--steps", type=int, default=400, help="of each (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of draws and runs (default: 0)")
    parser.add_argument("--folder", type=Path, required=True, help="new or empty folder for the runs, or the same one")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    log_to_stderr()
    try:
        settings = explicit_settings({"data": arguments.data, "config": arguments.config})
        settings |= {"max_steps": arguments.steps, "knn_every_epochs": 0}
        asked = {"settings": settings, "runs": arguments.runs, "seed": arguments.seed}
        runs, code = measured(json.loads(json.dumps(asked)), arguments.folder)
    except InputError as error:
        tell(error)
        return 2
    if code:
        return code
    whole = [one for one in runs if "knn" in one]
    accuracies = [one["knn"] for one in whole]
    agreement = {
        name: spearman(accuracies, [sign * one["figures"][name] for one in whole]) for name, sign in BETTER.items()
    }
    found = {
        "machine": machine("cpu"),
        "config": Path(arguments.config).name,
        "steps": arguments.steps,
        "finished": len(whole),
        "spearman_with_knn": {name: None if one is None else round(one, 3) for name, one in agreement.items()},
        "runs": runs,
    }
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
