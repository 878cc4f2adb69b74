"""What a classifier is trained on: labelled images, and for the consistency loss two views of unlabelled ones.

As in pretraining, a crop depends on (seed, kind, epoch, index, view) alone and the images of a step on the step alone.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from transformers import BaseImageProcessor

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import TuningArguments
from hf_vicreg.training.images.colour import finish_views
from hf_vicreg.training.images.order import MAX_SUBSTITUTES, StepSampler, alike
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.run.arguments import ViewsConfig

LABELLED, UNLABELLED = "labelled", "unlabelled"
FLAT = (230, 120, 30)  # a colour whose channels differ: one that is swapped or shifted shows
UNCHANGED = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]  # as `ViewSampler` draws colours where nothing is changed


class ClassifierImages(Dataset):
    """One weak view of a labelled image, a weak and a strong one of an unlabelled image."""

    def __init__(
        self,
        sources: dict[str, ImageSource],
        settings: TuningArguments,
        image_size: tuple[int, int],
        seed: int,
    ):
        """Keep the sources of each kind, `labelled` and maybe `unlabelled`."""
        self.sources, self.seed = sources, seed
        weak = ViewsConfig(
            crop_min_ratio=settings.crop_min_ratio,
            flip_probability=settings.flip_probability,
            jitter_probability=0.0,
            grayscale_probability=0.0,
            blur_probability=0.0,
            solarize_probability=0.0,
        )
        strong = ViewsConfig(crop_min_ratio=settings.strong_crop_min_ratio, flip_probability=settings.flip_probability)
        self.weak, self.strong = (ViewSampler.of_views(one, image_size)[0] for one in (weak, strong))

    def __getitem__(self, key: tuple[str, int, int]) -> dict[str, Any]:
        """Return `kind`, `crops` `(views, 3, height, width)` uint8, `colours`, `label` and `unusable` indices.

        An unreadable image is replaced by another one, the same in every run. `crops` is None when too many are.
        """
        kind, epoch, wanted = key
        source = self.sources[kind]
        substitutes = random.Random(f"{self.seed}/{kind}/{epoch}/{wanted}/substitute")
        unusable: list[int] = []
        for attempt in range(MAX_SUBSTITUTES):
            index = substitutes.randrange(len(source)) if attempt else wanted
            image = source.read(index)
            if image is not None:
                samplers = [self.weak] if kind == LABELLED else [self.weak, self.strong]
                drawn = [
                    sampler(image, random.Random(f"{self.seed}/{kind}/{epoch}/{wanted}/{view}"))
                    for view, sampler in enumerate(samplers)
                ]
                crops, colours = zip(*drawn, strict=True)
                label = source.labels[index] if kind == LABELLED and source.labels is not None else -1
                return {
                    "kind": kind,
                    "crops": torch.stack(crops),
                    "colours": torch.tensor(colours),
                    "label": label,
                    "unusable": unusable,
                }
            unusable.append(index)
        return {"kind": kind, "crops": None, "unusable": unusable}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return for each kind `crops` `(batch, views, 3, height, width)`, `colours` and `labels` `(batch,)`.

    `unusable` is the number of images that had to be replaced; kinds are missing where a replacement was not found.
    """
    batch: dict[str, Any] = {"unusable": sum(len(sample["unusable"]) for sample in samples)}
    for kind in (LABELLED, UNLABELLED):
        some = [sample for sample in samples if sample["kind"] == kind]
        if some and all(sample["crops"] is not None for sample in some):
            batch[kind] = {
                "crops": torch.stack(alike([sample["crops"] for sample in some])),
                "colours": torch.stack([sample["colours"] for sample in some]),
                "labels": torch.tensor([sample["label"] for sample in some]),
            }
    return batch


class PairedSampler(Sampler):
    """Step after step, the keys of one `StepSampler` a kind together."""

    def __init__(self, samplers: dict[str, StepSampler]):
        self.samplers = samplers

    def __len__(self) -> int:
        return min(map(len, self.samplers.values()))

    def __iter__(self) -> Iterator[list[tuple[str, int, int]]]:
        for shares in zip(*self.samplers.values(), strict=True):
            yield [(kind, *key) for kind, share in zip(self.samplers, shares, strict=True) for key in share]


def image_size_of(processor: BaseImageProcessor) -> tuple[int, int]:
    """Return (height, width) in pixels of the images that a processor makes, square where it keeps their shape."""
    settings = processor.to_dict()
    size = (settings.get("crop_size") if settings.get("do_center_crop") else None) or settings.get("size") or {}
    size = {"height": size, "width": size} if isinstance(size, int) else size
    side = size.get("shortest_edge") or 224
    return size.get("height") or side, size.get("width") or side


def pixel_values(part: dict[str, torch.Tensor], processor: BaseImageProcessor, device: torch.device) -> torch.Tensor:
    """Return a kind's views `(batch, views, 3, height, width)` float32, coloured, normalised as the processor does."""
    crops = part["crops"].to(device, non_blocking=True)
    settings = processor.to_dict()
    if not settings.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    else:
        mean, std = list(settings["image_mean"]), list(settings["image_std"])
    # view by view: weak ones have no colours to change, and a batch without any takes a short cut
    low, high = settings.get("channel_low"), settings.get("channel_high")
    finished = ((mean, std), None if low is None else (low, high))
    views = [finish_views(crops[:, view], part["colours"][:, view], *finished) for view in range(crops.shape[1])]
    return torch.stack(views, dim=1)


def check_pixels(processor: BaseImageProcessor) -> None:
    """Check on an image of one colour that training makes of it what the processor makes: testing uses the latter.

    Processors of images of science are ours, and are not asked.

    Raises:
        InputError: Other pixels, as of swapped channels or a normalisation of its own.
    """
    if getattr(processor, "channel_low", None) is not None:
        return
    height, width = image_size_of(processor)
    theirs = processor(Image.new("RGB", (width, height), FLAT), return_tensors="pt")["pixel_values"][0]
    part = {"crops": torch.tensor(FLAT, dtype=torch.uint8).view(1, 1, 3, 1, 1), "colours": torch.tensor([[UNCHANGED]])}
    ours = pixel_values(part, processor, torch.device("cpu")).flatten()
    found = theirs[..., theirs.shape[-2] // 2, theirs.shape[-1] // 2].flatten().float()
    if found.shape != ours.shape or not torch.allclose(found, ours, atol=0.02):
        shown = (", ".join(f"{float(one):.2f}" for one in values) for values in (ours, found))
        raise InputError(
            "`MODEL`: expected an image processor that divides RGB by 255 and normalises it by image_mean, image_std, "
            f"got {type(processor).__name__}, which makes of the colour {FLAT} not {next(shown)} but {next(shown)}; "
            "take a model with another processor."
        )
