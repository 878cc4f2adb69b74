"""The tables of README and of docs/scaling.md, from the results that are committed.

    python -m benchmarks.readme_tables

Each stands between two comments, which name it. A test compares what stands there with what this gives.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs" / "scaling.md")
PLACE = re.compile(
    r"(<!-- table: (\w+), made by benchmarks/readme_tables.py -->\n\n)(.*?)(\n\n<!-- table ends -->)", re.DOTALL
)
IMAGES = {"digits": "jittered digits", "cifar10": "images of CIFAR-10"}
TOKENS = (4096, 16384)
SHAPES = ((256, 2048), (256, 8192), (2048, 8192))


def encoders() -> str:
    """Return a row for each encoder that comes with the package, of the run that made it."""
    rows = []
    for path in sorted((ROOT / "model_cards").glob("*/results.json"), key=lambda one: one.parent.name, reverse=True):
        results, recipe = json.loads(path.read_text()), yaml.safe_load(path.with_name("recipe.yaml").read_text())
        accuracy = results["knn_accuracy"]
        if not accuracy:  # of images without labels
            continue
        rows.append(
            (
                f"{results['num_images']:,} {IMAGES[results['dataset']]}",
                f"`{path.parent.name}`",
                str(recipe["seed"]),
                f"{results['attention_density']:.3f}",
                f"{results['training_seconds']:,.0f} s",
                f"{accuracy['raw_pixels']:.3f}",
                "-" if recipe.get("model_name_or_path") else f"{accuracy['untrained']:.3f}",
                f"**{accuracy['trained']:.3f}**",
            )
        )
    return _table(("data", "recipe", "seed", "density", "training", "raw pixels", "untrained", "trained"), rows)


def attention() -> str:
    """Return the speed of sparse attention, forward and backward, against dense attention in the same run."""
    found = _rows("attention", "kind", "method", "tokens")
    rows = []
    for tokens in TOKENS:
        core, dense, layer = (
            found["core", "ours", tokens],
            found["core", "dense", tokens],
            found["layer", "ours", tokens],
        )
        memory = f"{dense['extra_memory_mb']:.0f} and {core['extra_memory_mb']:.0f} MB"
        speeds = f"**{core['speedup_forward_backward']:.1f}x**", f"{layer['speedup_forward_backward']:.1f}x"
        rows.append((f"{tokens:,}", f"{core['density']:.3f}", *speeds, memory))
    return _table(("tokens", "density", "core", "layer", "extra memory of the core, dense and ours"), rows)


def loss() -> str:
    """Return the speed of the loss against lightly's in the same run."""
    found = _rows("vicreg_loss", "method", "num_samples", "dimensions")
    rows = []
    for count, width in SHAPES:
        ours, theirs = found["ours", count, width], found["lightly", count, width]
        memory = f"{theirs['extra_memory_mb']:,.0f} and {ours['extra_memory_mb']:,.0f} MB"
        speed = ours["times_lightly"]
        rows.append((f"{count:,}", f"{width:,}", f"**{speed:.{1 if speed < 10 else 0}f}x**", memory))
    return _table(("N", "D", "speed", "extra memory, lightly and ours"), rows)


def measured() -> str:
    """Return the share of its speed that a process keeps beside others, on CPU cores."""
    found = _results("scaling")["measured"]
    rows = [
        (str(one["processes"]), f"{one['images_a_second']:.0f}", f"{one['efficiency']:.2f}", _words(one["turns"]))
        for one in found
    ]
    return _table(("processes", "images/s of all", "efficiency", "of each turn"), rows)


def modelled() -> str:
    """Return the efficiency that the model gives, by encoder, GPUs and network."""
    found = {(one["encoder"], one["gpus"], one["network"]): one for one in _results("scaling")["model"]}
    networks = list(dict.fromkeys(one for _, _, one in found))
    rows = []
    for encoder, gpus in dict.fromkeys(key[:2] for key in found):
        own = [found.get((encoder, gpus, one)) for one in networks]
        cells = ["" if one is None else f"{one['efficiency']:.2f}" for one in own]
        steps = next(one for one in own if one is not None)
        rows.append((encoder, str(gpus), f"{steps['compute_ms']:.0f} ms", *cells))
    return _table(("encoder", "GPUs", "a step computes", *networks), rows)


TABLES: dict[str, Callable[[], str]] = {
    "encoders": encoders,
    "attention": attention,
    "loss": loss,
    "measured": measured,
    "modelled": modelled,
}


def with_tables(text: str) -> str:
    """Return a page with each of its tables made anew."""
    return PLACE.sub(lambda found: found[1] + TABLES[found[2]]() + found[4], text)


def _results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def _words(numbers: Sequence[float]) -> str:
    return ", ".join(f"{one:.2f}" for one in numbers)


def _rows(name: str, *keys: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows = _results(name)["rows"]
    return {tuple(row[key] for key in keys): row for row in rows if "processes" not in row}


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
