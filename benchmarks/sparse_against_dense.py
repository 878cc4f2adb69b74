"""Does sparsity matter in training? The same small encoder on large grids, sparse and dense, at equal steps and time.

    python -m benchmarks.sparse_against_dense --dataset_name FOLDER --output_dir runs/sparse_against_dense

Three pretrainings of one recipe: sparse and dense for the same number of steps, and sparse again for about as long as
dense took. Features are compared by retrieval: a left and a right square of each held-out image, which do not overlap;
how often is the nearest right crop (cosine) of a left crop that of the same image, and the other way round?
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from datasets import load_dataset
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop
from transformers import AutoConfig, AutoModel

import hf_vicreg  # noqa: F401  registers the model

TIMEOUT_S = 3600
MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "intermediate_size": 128,
    "patch_size": 8,
    "initializer_range": 0.06,
}


def train(arguments: argparse.Namespace, name: str, steps: int, attention_type: str) -> dict:
    """Run one pretraining in a process of its own and return its figures."""
    folder = arguments.output_dir / name
    flags = {
        "output_dir": folder,
        "dataset_name": arguments.dataset_name,
        "batch_size": arguments.batch_size,
        "max_steps": steps,
        "num_train_epochs": 1000,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.2,
        "logging_steps": 1,
        "knn_every_epochs": 0,
        "seed": arguments.seed,
        "vicreg.expander_sizes": "[512, 512, 512]",
        "vicreg.variance_weight": 10.0,
        "vicreg.invariance_weight": 10.0,
        "views.crop_min_ratio": 0.2,
        "views.blur_probability": 0.0,
        "views.hue": 0.0,
        "model.image_size": arguments.image_size,
        "model.attention_type": attention_type,
        **{f"model.{field}": value for field, value in MODEL.items()},
    }
    command = [sys.executable, "-m", "hf_vicreg.training.pretrain"]
    command += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    with (arguments.output_dir / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        started = time.monotonic()
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - started > TIMEOUT_S:
                process.kill()
            time.sleep(0.5)
    if status:
        raise SystemExit(f"{name} failed: see {log.name}")
    results = json.loads((folder / "results.json").read_text())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-5:]
    return {
        "run": name,
        "density": round(results["attention_density"], 3),
        "steps": results["steps"],
        "training_s": results["training_seconds"],
        "images_per_second": round(arguments.batch_size * results["steps"] / results["training_seconds"], 2),
        "peak_memory_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        **{
            part: round(sum(line[part] for line in last) / len(last), 3)
            for part in ("loss", "invariance", "variance", "covariance")
        },
    }


def crops(dataset_name: str, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the left and the right crop of each held-out image, `(images, 3, side, side)`, in [0, 1]."""
    left: list[torch.Tensor] = []
    right: list[torch.Tensor] = []
    for split in ("validation", "test"):
        for row in load_dataset(dataset_name, split=split):
            pixels = pil_to_tensor(row["image"].convert("RGB"))
            height, width = pixels.shape[-2:]
            half = min(width // 2, height)
            top = (height - half) // 2
            for where, start in ((left, width // 2 - half), (right, width // 2)):
                where.append(resized_crop(pixels, top, start, half, half, [side, side]))
    return torch.stack(left) / 255, torch.stack(right) / 255


@torch.no_grad()
def retrieval(encode, left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the share of crops whose nearest neighbour on the other side is of the same image."""
    sides = [F.normalize(torch.cat([encode(one) for one in side.split(4)]), dim=-1) for side in (left, right)]
    similarity = sides[0] @ sides[1].T
    same = torch.arange(len(left))
    hits = (similarity.argmax(1) == same).sum() + (similarity.argmax(0) == same).sum()
    return round(hits.item() / (2 * len(left)), 3)


def encoder(model: torch.nn.Module):
    """Return a function from crops in [0, 1] to features."""
    mean, std = (torch.tensor(one)[:, None, None] for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    model.eval()
    return lambda pixels: model(pixel_values=(pixels - mean) / std).pooler_output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True, help="folder with train, validation and test")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--image_size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True)

    rows = [train(arguments, "dense", arguments.steps, "original_full")]
    rows.append(train(arguments, "sparse", arguments.steps, "block_sparse"))
    longer = round(arguments.steps * rows[0]["training_s"] / rows[1]["training_s"])
    rows.append(train(arguments, "sparse-equal-time", longer, "block_sparse"))

    left, right = crops(arguments.dataset_name, arguments.image_size)
    chance = {
        "chance": round(1 / len(left), 3),
        "mean_colour": retrieval(lambda pixels: pixels.mean((2, 3)) - left.mean((0, 2, 3)), left, right),
        "pixels_32x32": retrieval(
            lambda pixels: F.interpolate(pixels, (32, 32), mode="area").flatten(1) - left.mean(), left, right
        ),
    }
    for row in rows:
        folder = arguments.output_dir / row["run"]
        torch.manual_seed(arguments.seed)
        row["retrieval_untrained"] = retrieval(
            encoder(AutoModel.from_config(AutoConfig.from_pretrained(folder))), left, right
        )
        row["retrieval"] = retrieval(encoder(AutoModel.from_pretrained(folder)), left, right)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    print(chance)
    if arguments.out:
        result = {
            "command": "python -m benchmarks.sparse_against_dense " + " ".join(sys.argv[1:]),
            "cpu_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "image_size": arguments.image_size,
            "held_out_images": len(left),
            "baselines": chance,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
