"""Emoji found by words: their data made ready, and how well one drawing finds the other.

    python -m benchmarks.emoji EMOJI runs/evidence/emoji_images
    python -m benchmarks.emoji EMOJI runs/evidence/emoji_images --model runs/evidence/emoji

EMOJI is a `datasets` folder with `image`, `other_image`, `caption`, `name_de` and `name_fr`. For training, both
drawings of an emoji are images of their own with its captions; the test split keeps the first. The model, of a run
with these captions, then gives the features by which each test drawing looks for the other drawing of its emoji.
"""

import argparse
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoProcessor

import hf_vicreg  # noqa: F401  registers the model

CAPTIONS = ["caption", "name_de", "name_fr"]


def write_images(emoji: datasets.DatasetDict, folder: Path) -> None:
    """Write parquet files of both drawings for training and of the first for the test."""
    folder.mkdir(parents=True, exist_ok=True)
    train = emoji["train"]
    other = train.select_columns(["other_image", *CAPTIONS]).rename_column("other_image", "image")
    both = datasets.concatenate_datasets([train.select_columns(["image", *CAPTIONS]), other])
    both.to_parquet(folder / "train.parquet")
    emoji["test"].select_columns(["image", *CAPTIONS]).to_parquet(folder / "test.parquet")


def recalls(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Return the shares of rows whose nearest row of the other features is their own, both ways, by cosine."""
    cosines = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    own = torch.arange(len(cosines))
    return tuple(cosines.argmax(axis).eq(own).float().mean().item() for axis in (1, 0))  # type: ignore[return-value]


@torch.no_grad()
def drawing_to_drawing(emoji: datasets.Dataset, model: str) -> dict[str, tuple[float, float]]:
    """Return recall at 1, from the first drawing to the other and back, of embeddings, pooled features and pixels."""
    dual, processor = AutoModel.from_pretrained(model).eval(), AutoProcessor.from_pretrained(model)
    features: dict[str, list[torch.Tensor]] = {"embedding": [], "encoder": [], "pixels": []}
    for column in ("image", "other_image"):
        images = [image.convert("RGB") for image in emoji[column]]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        features["embedding"].append(dual.get_image_features(pixels).pooler_output)
        features["encoder"].append(dual.vision_model(pixels).pooler_output)
        features["pixels"].append(pixels.flatten(1))
    return {name: recalls(*both) for name, both in features.items()}


def main() -> None:
    """Make the data, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("emoji", help="folder that `datasets` loads")
    parser.add_argument("out", type=Path, help="folder for the images, new or of an earlier call")
    parser.add_argument("--model", help="folder of a run on these images: measure instead")
    asked = parser.parse_args()
    emoji = datasets.load_dataset(asked.emoji)
    if asked.model is None:
        write_images(emoji, asked.out)
        return
    for name, (there, back) in drawing_to_drawing(emoji["test"], asked.model).items():
        print(f"{name:<10} {there:.3f} {back:.3f}")


if __name__ == "__main__":
    main()
