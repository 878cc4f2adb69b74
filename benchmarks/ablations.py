"""What parts of the recipe are worth, on CIFAR-10: short runs, several seeds, one driver.

    python -m benchmarks.ablations --dataset_name CIFAR10_FOLDER --out benchmarks/results/ablations.json

Every arm is its family's recipe with what its name says, trained for the same number of steps on the same images in
the same order; its k-NN accuracy is that of the encoder's pooled features. Two families: `small`, patches of 8 pixels
that overlap by half (49 tokens), and `grid16`, 16x16 patches of 2 pixels in tiles of 2x2, where the random links of
the attention matter. Objectives other than VICReg see the same views through the same encoder: `infonce` is SimCLR's
NT-Xent (Chen et al. 2020, arXiv 2002.05709; temperature 0.5, their choice for CIFAR-10) on the same expander,
`supervised` cross-entropy of a linear layer on both views.

Finished runs are kept in the output and not done again; one process a file. A run takes one thread.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measuring import machine
from hf_vicreg import VicRegForPreTraining
from hf_vicreg.training.building import attention_density
from hf_vicreg.training.engine.optim import build_optimizer, learning_rate_at
from hf_vicreg.training.evaluation.features import encode, model_encoder
from hf_vicreg.training.evaluation.neighbours import knn_accuracy
from hf_vicreg.training.images.colour import finish_batch
from hf_vicreg.training.images.order import StepSampler, ViewDataset, collate
from hf_vicreg.training.images.sources import ImageSource, load_sources
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.run.processors import build_processor
from hf_vicreg.training.run.resolve import resolve

TEMPERATURE = 0.5
# what the recipe had when the figures were made
THEN = {"image_size": 32, "tile_size": 2, "num_random_blocks": 2}
SMALL = {
    "max_train_samples": 10_000,
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "model": THEN | {"hidden_size": 96, "intermediate_size": 288},
    "vicreg": {"expander_sizes": [1024, 1024, 1024]},
}
GRID16 = {
    "max_train_samples": 5_000,
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "batch_size": 128,
    "model": THEN
    | {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 2,
        "patch_size": 2,
        "patch_stride": None,
        "num_random_blocks": 3,
    },
    "vicreg": {"expander_sizes": [1024, 1024, 1024]},
}
# family, changed settings, objective
ARMS: dict[str, tuple[dict, dict, str]] = {
    "base": (SMALL, {}, "vicreg"),
    "untrained": (SMALL, {}, "none"),
    "layer norm in the expander": (SMALL, {"vicreg": {"expander_norm": "layer"}}, "vicreg"),
    "2 local views of 16 pixels": (SMALL, {"views": {"num_local_views": 2, "local_image_size": 16}}, "vicreg"),
    "4-pixel patches, no overlap": (SMALL, {"model": {"patch_size": 4, "patch_stride": None}}, "vicreg"),
    "8-pixel patches, no overlap": (SMALL, {"model": {"patch_stride": None, "tile_size": 1}}, "vicreg"),
    "infonce": (SMALL, {}, "infonce"),
    "supervised": (SMALL, {}, "supervised"),
    "16x16, r = 3": (GRID16, {}, "vicreg"),
    "16x16, r = 0": (GRID16, {"model": {"num_random_blocks": 0}}, "vicreg"),
    "16x16, dense": (GRID16, {"model": {"attention_type": "original_full"}}, "vicreg"),
    "16x16, untrained": (GRID16, {}, "none"),
}


def configuration(arm: str, dataset_name: str, seed: int) -> RunConfig:
    """Return the `cifar10_cpu` recipe with an arm's family and change."""
    family, change, _ = ARMS[arm]
    settings: dict[str, Any] = {"config": "cifar10_cpu", "dataset_name": dataset_name, "output_dir": "-", "seed": seed}
    for part in (family, change):
        for key, value in copy.deepcopy(part).items():
            settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    return resolve(settings)


def infonce(embeddings: torch.Tensor) -> torch.Tensor:
    """NT-Xent of embeddings `(batch, 2, dimensions)`: each view finds the other among all others of the batch."""
    z = F.normalize(embeddings.transpose(0, 1).flatten(0, 1), dim=1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    half = len(embeddings)
    return F.cross_entropy(logits, torch.arange(2 * half).roll(half))


def train(config: RunConfig, objective: str, source: ImageSource, progress: Callable[[str], None]) -> tuple:
    """Return the trained model and its seconds."""
    run = config.run
    torch.manual_seed(run.seed)
    model = VicRegForPreTraining(config.vicreg).train()
    assert source.labels is not None
    head = torch.nn.Linear(model.expander.in_features, max(source.labels) + 1)
    model.add_module("head", head)
    optimizer = build_optimizer(model, "adamw", run.learning_rate, run.weight_decay, (run.adam_beta1, run.adam_beta2))
    dataset = ViewDataset(source, ViewSampler.of_views(config.views, config.image_size), run.seed)
    num_steps = run.num_train_epochs * (len(source) // run.batch_size)
    started = time.perf_counter()
    for step, keys in enumerate(StepSampler(len(source), run.batch_size, run.seed, 0, num_steps, 0, 1)):
        if objective == "none":
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, num_steps, run.learning_rate, run.warmup_ratio)
        images = finish_batch(collate([dataset[key] for key in keys]), torch.device("cpu"))
        if objective == "vicreg":
            loss = model(**images).loss
        else:
            encoded = model(**images, return_loss=False).representations
            if objective == "infonce":
                loss = infonce(torch.stack([model.expander(one) for one in encoded.unbind(1)], dim=1))
            else:
                labels = torch.tensor([source.labels[index] for _, index in keys])
                loss = F.cross_entropy(head(encoded.flatten(0, 1)), labels.repeat_interleave(2))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.encoder.parameters(), run.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress(f"step {step} of {num_steps}, loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s")
    return model, time.perf_counter() - started


def measure(arm: str, seed: int, dataset_name: str, samples: int) -> dict:
    """Return one run's figures."""
    config = configuration(arm, dataset_name, seed)
    source, test = load_sources(dataset_name=dataset_name)
    assert test is not None
    model, seconds = train(
        config,
        ARMS[arm][2],
        source.first(config.run.max_train_samples),
        lambda text: print(f"{arm}, seed {seed}: {text}", flush=True),
    )
    processor = build_processor(config)
    encoded = [encode(one.first(samples), processor, model_encoder(model.encoder.eval())) for one in (source, test)]
    accuracy = knn_accuracy(*encoded[0], *encoded[1], neighbours=config.run.knn_neighbours)
    return {
        "arm": arm,
        "seed": seed,
        "knn_samples": samples,
        "knn_accuracy": accuracy,
        "density": round(attention_density(config), 3),
        "training_seconds": round(seconds, 1),
    }


def table(rows: list[dict]) -> str:
    """Return a Markdown table: mean, spread and seeds of each arm."""
    lines = ["| arm | density | 20-NN, mean | standard deviation | seeds | seconds |", "| --- " * 6 + "|"]
    for arm in ARMS:
        runs = [row for row in rows if row["arm"] == arm]
        if runs:
            found = [row["knn_accuracy"] for row in runs]
            spread = f"{statistics.stdev(found):.4f}" if len(found) > 1 else ""
            each = ", ".join(f"{one:.3f}" for one in found)
            seconds = statistics.median(row["training_seconds"] for row in runs)
            density = runs[0]["density"]
            lines.append(f"| {arm} | {density} | {statistics.mean(found):.4f} | {spread} | {each} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="CIFAR-10 as a `datasets` folder or Hub id")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--knn_samples", type=int, default=5_000, help="images of the bank, and of the queries")
    parser.add_argument("--out", type=Path, help="JSON file; runs found there are not done again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(arguments.out.read_text()) if arguments.out is not None and arguments.out.exists() else {}
    rows = found.get("rows", [])
    for seed in arguments.seeds:
        for arm in arguments.arms:
            key = {"arm": arm, "seed": seed, "knn_samples": arguments.knn_samples}
            if not any(key.items() <= row.items() for row in rows):
                rows.append(measure(arm, seed, arguments.dataset_name, arguments.knn_samples))
                print(rows[-1], flush=True)
                if arguments.out is not None:
                    content = {"machine": machine("cpu"), "rows": rows}
                    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
