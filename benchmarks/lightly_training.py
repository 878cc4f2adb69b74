"""Trains by lightly for a given time, and measures k-NN: the peer beside `hf-vicreg pretrain` at equal minutes.

    python -m benchmarks.lightly_training resnet18 --dataset_name CIFAR10_FOLDER --seconds 720 --out runs/resnet18.json

Two arms. `resnet18` is lightly's own example of VICReg on CIFAR-10: torchvision's ResNet-18, a head of 2,048 and
2,048, views of 32 pixels, batch 256, plain SGD at 0.06 without a schedule. `bigbird` has lightly's transform, head and
loss around the encoder of the recipe `cifar10_cpu`, views of 24 pixels and an expander of 2,048 three times, with
AdamW at 1e-3, which is warmed up and lowered by a cosine of the time; SGD at 0.06 is no optimiser for a transformer.
Nothing was tuned.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.transforms import VICRegTransform
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.measuring import machine
from hf_vicreg import BigBirdViTConfig, BigBirdViTModel
from hf_vicreg.training.evaluation.neighbours import knn_accuracy
from hf_vicreg.training.run.settings import read_recipe

BATCH, LOGGED = 256, 20
BANK, QUERIES, NEIGHBOURS = 10_000, 2_000, 20
SIDES = (24, 32, 40)  # of the images that features are measured with
WARMUP = 0.1  # of the time
MEAN, STD = (torch.tensor(one)[:, None, None] for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class Pooled(nn.Module):
    """A BigBirdViT as a function from pixels to pooled features."""

    def __init__(self, encoder: BigBirdViTModel):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixel_values).pooler_output


def arm(name: str) -> tuple[nn.Module, nn.Module, int, torch.optim.Optimizer]:
    """Return encoder, head, side of the views and optimiser."""
    if name == "resnet18":
        from torchvision.models import resnet18

        encoder: nn.Module = nn.Sequential(*list(resnet18().children())[:-1], nn.Flatten())
        head = VICRegProjectionHead(input_dim=512, hidden_dim=2048, output_dim=2048, num_layers=2)
        return encoder, head, 32, torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.06)
    fields = read_recipe("cifar10_cpu")["model"]
    encoder = Pooled(BigBirdViTModel(BigBirdViTConfig(**fields)))
    head = VICRegProjectionHead(input_dim=fields["hidden_size"], hidden_dim=2048, output_dim=2048)
    both = [*encoder.parameters(), *head.parameters()]
    return encoder, head, 24, torch.optim.AdamW(both, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95))


class Views(torch.utils.data.Dataset):
    """Both views of each image, decoded once and kept in memory as torchvision's CIFAR-10 is."""

    def __init__(self, pixels: list[np.ndarray], transform: Any):
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return list(self.transform(Image.fromarray(self.pixels[index])))


def read(name: str, split: str) -> tuple[list[np.ndarray], torch.Tensor]:
    """Return the pixels and labels of a split."""
    rows = load_dataset(name, split=split)
    return [np.asarray(row["image"].convert("RGB")) for row in rows], torch.tensor(rows["label"])


@torch.no_grad()
def features(encoder: nn.Module, pixels: list[np.ndarray], side: int) -> torch.Tensor:
    """Return features of images enlarged or reduced to a side, `(images, features)`."""
    encoder.eval()
    found = []
    for start in range(0, len(pixels), BATCH):
        batch = torch.from_numpy(np.stack(pixels[start : start + BATCH])).permute(0, 3, 1, 2).float() / 255
        batch = F.interpolate(batch, (side, side), mode="bilinear", antialias=True, align_corners=False)
        found.append(encoder((batch - MEAN) / STD))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm", choices=("resnet18", "bigbird"))
    parser.add_argument("--dataset_name", required=True, help="folder or Hub id with images and labels")
    parser.add_argument("--seconds", type=float, required=True, help="of training, data included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; its log goes beside it")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    np.random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    train, test = read(arguments.dataset_name, "train"), read(arguments.dataset_name, "test")
    encoder, head, side, optimizer = arm(arguments.arm)
    loader = DataLoader(
        Views(train[0], VICRegTransform(input_size=side)), batch_size=BATCH, shuffle=True, drop_last=True
    )
    criterion, rate, steps = VICRegLoss(), optimizer.param_groups[0]["lr"], 0
    began = time.perf_counter()
    with arguments.out.with_suffix(".jsonl").open("w") as log:
        while (taken := time.perf_counter() - began) < arguments.seconds:
            for one, other in loader:
                share = (time.perf_counter() - began) / arguments.seconds
                if arguments.arm == "bigbird":
                    cosine = (1 + math.cos(math.pi * min(1.0, (share - WARMUP) / (1 - WARMUP)))) / 2
                    optimizer.param_groups[0]["lr"] = rate * (share / WARMUP if share < WARMUP else cosine)
                if share >= 1:
                    break
                loss = criterion(head(encoder(one)), head(encoder(other)))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
                if steps % LOGGED == 0:
                    taken = time.perf_counter() - began
                    line = {"step": steps, "loss": loss.item(), "seconds": round(taken, 1)}
                    log.write(json.dumps(line | {"images_per_second": round(steps * BATCH / taken, 1)}) + "\n")
                    log.flush()
        taken = time.perf_counter() - began
    found = {}
    for size in SIDES:
        bank, queries = (features(encoder, pixels, size) for pixels in (train[0][:BANK], test[0][:QUERIES]))
        found[size] = round(knn_accuracy(bank, train[1][:BANK], queries, test[1][:QUERIES], neighbours=NEIGHBOURS), 4)
    result = {
        "arm": arguments.arm,
        "seed": arguments.seed,
        "steps": steps,
        "training_seconds": round(taken, 1),
        "images_per_second": round(steps * BATCH / taken, 1),
        "encoder_parameters": sum(one.numel() for one in encoder.parameters()),
        "knn_by_side": found,
        **machine("cpu"),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
