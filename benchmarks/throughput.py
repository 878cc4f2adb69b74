"""Images a second, by stage and end to end: ours against lightly's transform, collate and loss, in one run.

    python -m benchmarks.throughput --out benchmarks/results/throughput.json

Two parts. `views`: JPEG files to two normalised views in one tensor, one thread, by CPU seconds, which a busy machine
disturbs least. `ours_crops` is what our loader's processes do, the rest may be a GPU's; `ours_prepared` reads what
`hf-vicreg prepare` stored; `lightly` is lightly's `VICRegTransform`, torchvision v2 on PIL with Pillow's blur;
`torchvision` the same operations with torchvision's own `GaussianBlur` of 23 pixels, as the authors' recipe has it in
most ports.

`training`: steps of one small ViT with one expander, once fed and judged by us and once by lightly, no loader
processes. The two take turns, so that a slow minute hits both; medians of seconds, and of ratios in the same turn.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.measuring import machine
from benchmarks.photographs import QUALITY, write_photographs
from hf_vicreg import BigBirdViTConfig, VicRegConfig, VicRegForPreTraining, vicreg_loss
from hf_vicreg.training.engine.optim import build_optimizer
from hf_vicreg.training.images.colour import finish_batch
from hf_vicreg.training.images.order import StepSampler, ViewDataset, collate
from hf_vicreg.training.images.sources import ImageSource, load_sources
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.prepare.store import prepare
from hf_vicreg.training.run.arguments import ViewsConfig

PHOTOGRAPH = (500, 375)  # ImageNet's most common size
STAGES = ("decode_crop", "colour", "forward", "loss", "backward", "step")


def our_crops(source: ImageSource, image_size: int, num_images: int) -> Callable[[], dict[str, Any]]:
    """Return a function that gives one collated batch of uint8 crops."""
    dataset = ViewDataset(source, ViewSampler.of_views(ViewsConfig(), (image_size, image_size)), seed=0)
    epochs = iter(range(10**6))

    def batch() -> dict[str, Any]:
        epoch = next(epochs)
        return collate([dataset[epoch, index] for index in range(num_images)])

    return batch


def pil_views(paths: list[Path], transform: Callable[[Image.Image], Any]) -> torch.Tensor:
    """Return the views of a PIL transform, collated `(2, images, 3, height, width)`."""
    views = []
    for path in paths:
        with Image.open(path) as image:
            views.append(transform(image.convert("RGB")))
    return torch.stack([torch.stack(view) for view in zip(*views, strict=True)])


def torchvision_views(image_size: int) -> Callable[[Image.Image], list[torch.Tensor]]:
    """Return VICReg's transform written in torchvision v2 alone."""
    from torchvision.transforms import v2

    view = v2.Compose(
        [
            v2.RandomResizedCrop(image_size, scale=(0.08, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23)], p=0.5),
            v2.RandomSolarize(128, p=0.1),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return lambda image: [view(image), view(image)]


def measure_views(folder: Path, image_size: int, num_images: int, repeats: int) -> list[dict]:
    """Return CPU seconds of one thread for each way to two views, and how many times lightly's speed that is."""
    from lightly.transforms import VICRegTransform

    source, _ = load_sources(train_dir=str(folder))
    prepare(folder, folder.with_name("prepared"), num_proc=1)
    prepared, _ = load_sources(dataset_name=str(folder.with_name("prepared")))
    paths = sorted(folder.iterdir())[:num_images]
    crops, prepared_crops = (our_crops(one, image_size, num_images) for one in (source, prepared))
    lightly, torchvision = VICRegTransform(input_size=image_size), torchvision_views(image_size)
    cpu = torch.device("cpu")
    ways: dict[str, Callable[[], Any]] = {
        "lightly": lambda: pil_views(paths, lightly),
        "torchvision": lambda: pil_views(paths, torchvision),
        "ours": lambda: finish_batch(crops(), cpu),
        "ours_crops": crops,
        "ours_prepared": lambda: finish_batch(prepared_crops(), cpu),
        "ours_prepared_crops": prepared_crops,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = time.process_time()
            way()
            times[name].append(time.process_time() - started)
    return [
        {
            "views": name,
            "image_size": image_size,
            "ms_an_image": round(1000 * statistics.median(own[1:]) / num_images, 2),  # the first turn fills caches
            "images_a_second_and_core": round(num_images / statistics.median(own[1:])),
            **{f"times_{base}": ratio(times[base], own) for base in ("lightly", "torchvision")},
        }
        for name, own in times.items()
    ]


def ratio(base: list[float], own: list[float]) -> float:
    """Return the median of ratios of the same turn, without the first."""
    return round(statistics.median(one / other for one, other in zip(base[1:], own[1:], strict=True)), 2)


class Side:
    """One of the two pipelines around its own copy of the model."""

    def __init__(self, model: VicRegForPreTraining, loader: Iterator[Any], device: torch.device):
        self.model = copy.deepcopy(model).to(device).train()
        self.optimizer = build_optimizer(self.model, "adamw", 1e-4, 0.05, (0.9, 0.95))
        self.loader, self.device = loader, device

    def views(self, batch: Any) -> torch.Tensor:
        """Return `(batch, 2, 3, height, width)` on the device, normalised."""
        return finish_batch(batch, self.device)["pixel_values"]

    def loss(self, z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
        """Return the loss of two views' embeddings."""
        return vicreg_loss(z_a, z_b).loss

    def step(self) -> dict[str, float]:
        """Train on one batch; return the seconds of each stage."""
        marks = [self._now()]
        batch = next(self.loader)
        marks.append(self._now())
        views = self.views(batch)
        marks.append(self._now())
        encoded = self.model(pixel_values=views, return_loss=False).representations
        embeddings = [self.model.expander(one, None) for one in encoded.unbind(1)]
        marks.append(self._now())
        loss = self.loss(*embeddings)
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(self._now())
        return {name: after - before for name, before, after in zip(STAGES, marks, marks[1:], strict=False)}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class LightlySide(Side):
    """The same model with lightly's transform, collate and loss; colour is part of its transform."""

    def views(self, batch: Any) -> torch.Tensor:
        return torch.stack(batch[0], dim=1).to(self.device, non_blocking=True)

    def loss(self, z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
        from lightly.loss import VICRegLoss

        return VICRegLoss()(z_a, z_b)


def measure_training(folder: Path, arguments: argparse.Namespace) -> list[dict]:
    """Return images a second of each stage and end to end, of both sides."""
    from lightly.data import LightlyDataset
    from lightly.data.multi_view_collate import MultiViewCollate
    from lightly.transforms import VICRegTransform

    size, batch_size, device = arguments.image_size, arguments.batch_size, torch.device(arguments.device)
    source, _ = load_sources(train_dir=str(folder))
    steps = arguments.repeats + 1
    dataset = ViewDataset(source, ViewSampler.of_views(ViewsConfig(), (size, size)), seed=0)
    workers: dict[str, Any] = {"num_workers": arguments.workers, "pin_memory": arguments.device == "cuda"}
    ours = DataLoader(
        dataset,
        batch_sampler=StepSampler(len(source), batch_size, 0, 0, steps, 0, 1, 1),
        collate_fn=collate,
        **workers,
    )
    theirs = DataLoader(
        LightlyDataset(str(folder), transform=VICRegTransform(input_size=size)),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=MultiViewCollate(),
        **workers,
    )
    torch.manual_seed(0)
    model = VicRegForPreTraining(
        VicRegConfig(encoder=encoder_config(arguments), expander_sizes=(arguments.dimensions,) * 3)
    )
    sides = {
        "ours": Side(model, iter(ours), device),
        "lightly": LightlySide(model, (batch for _ in range(steps) for batch in theirs), device),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(steps):
        for name, side in sides.items():
            found[name].append(side.step())
    totals = {name: [sum(stages.values()) for stages in own] for name, own in found.items()}
    return [
        {
            "training": name,
            "images_a_second": round(batch_size / statistics.median(totals[name][1:]), 1),
            "times_lightly": ratio(totals["lightly"], totals[name]),
            "ms_an_image": {
                stage: round(1000 * statistics.median(one[stage] for one in own[1:]) / batch_size, 3)
                for stage in STAGES
            },
        }
        for name, own in found.items()
    ]


def encoder_config(arguments: argparse.Namespace) -> BigBirdViTConfig:
    """Return the small ViT: the width, depth and heads of the recipe `cifar10_cpu`, on patches of 16."""
    return BigBirdViTConfig(
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.hidden_size // 32,
        intermediate_size=3 * arguments.hidden_size,
        image_size=arguments.image_size,
        patch_size=16,
        pooling="mean",
        tile_size=2,
        num_random_blocks=2,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the training part")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--view_size", type=int, default=224, help="side of the views of the first part")
    parser.add_argument("--view_images", type=int, default=32, help="images a turn of the first part")
    parser.add_argument("--image_size", type=int, default=96, help="side of the views of the training part")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--dimensions", type=int, default=2048, help="width of the expander's three layers")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="loader processes of the training part, for both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the training part")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photographs"
        count = max(arguments.batch_size, arguments.view_images)
        mean_bytes = write_photographs(folder, count, *PHOTOGRAPH)
        torch.set_num_threads(1)
        rows = measure_views(folder, arguments.view_size, arguments.view_images, arguments.repeats)
        torch.set_num_threads(arguments.threads)
        rows += measure_training(folder, arguments)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    pinned = {
        "photographs": f"{PHOTOGRAPH[0]}x{PHOTOGRAPH[1]} synthetic, quality {QUALITY}, {mean_bytes / 1000:.0f} kB",
        "encoder": encoder_config(arguments).to_diff_dict(),
        "dimensions": arguments.dimensions,
        "batch_size": arguments.batch_size,
        "loader_processes": arguments.workers,
    }
    print(json.dumps(pinned))
    if arguments.out:
        from importlib.metadata import version

        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": "python -m benchmarks.throughput " + " ".join(sys.argv[1:]),
            "machine": machine(arguments.device)
            | {name: version(name) for name in ("lightly", "torchvision", "pillow")},
            "pinned": pinned,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
