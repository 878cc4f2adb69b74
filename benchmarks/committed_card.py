"""Writes the card of a finished run into `model_cards/NAME/`, with the evidence that every figure of it comes from.

    python -m benchmarks.committed_card runs/digits digits

Beside the card lie weights, configuration and image processor, `results.json`, `recipe.yaml`, the pictures and
`log.jsonl`; code does not. Tests make each committed card again from these and compare, and measure the weights.
Weights of more than 6 MB are stored in half precision, and load in the precision of `config.json`.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_vicreg.model_cards.card import model_card
from hf_vicreg.publishing.staging import stage
from hf_vicreg.training.monitor.run_log import read_log

LICENSE = "apache-2.0"  # the repository's own
CARDS = Path(__file__).resolve().parents[1] / "model_cards"
EVIDENCE = ("README.md", "results.json", "recipe.yaml")
LARGEST = 6_000_000  # bytes of weights
MODEL = ("config.json", "model.safetensors", "preprocessor_config.json")


def halve(path: Path) -> None:
    """Store weights in fp16."""
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata()
    halved = {name: one.half() if one.is_floating_point() else one for name, one in load_file(path).items()}
    save_file(halved, path, metadata)


def main() -> None:
    """Stage the run as publishing does, and keep what is evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("name", metavar="NAME", help="what it is called in the package")
    arguments = parser.parse_args()
    folder = CARDS / arguments.name
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        staged = stage(arguments.run, Path(scratch), repo=f"hf-vicreg/{arguments.name}", license=LICENSE)
        facts = dataclasses.replace(staged.facts, repo_id=None, comes_with_package=True)
        (staged.folder / "README.md").write_text(model_card(facts), encoding="utf-8")
        for name in [*EVIDENCE, *MODEL, *staged.facts.pictures]:
            shutil.copyfile(staged.folder / name, folder / name)
    if (folder / "model.safetensors").stat().st_size > LARGEST:
        halve(folder / "model.safetensors")
    log = read_log(arguments.run / "log.jsonl")
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
