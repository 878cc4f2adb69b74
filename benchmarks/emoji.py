"""Emoji as images with captions: `python -m benchmarks.emoji EMOJI OUT`.

EMOJI is a `datasets` folder with `image`, `other_image`, `caption`, `name_de` and `name_fr`. OUT gets parquet files:
for training both drawings of an emoji as images of their own with its captions, for the test the first. `hf-vicreg
evaluate image-text` measures on EMOJI itself, where a drawing can look for the other one of its emoji.
"""

import sys
from pathlib import Path

import datasets

CAPTIONS = ["caption", "name_de", "name_fr"]


def write_images(emoji: datasets.DatasetDict, folder: Path) -> None:
    """Write the files of both splits."""
    folder.mkdir(parents=True, exist_ok=True)
    train = emoji["train"]
    other = train.select_columns(["other_image", *CAPTIONS]).rename_column("other_image", "image")
    both = datasets.concatenate_datasets([train.select_columns(["image", *CAPTIONS]), other])
    both.to_parquet(folder / "train.parquet")
    emoji["test"].select_columns(["image", *CAPTIONS]).to_parquet(folder / "test.parquet")


if __name__ == "__main__":
    write_images(datasets.load_dataset(sys.argv[1]), Path(sys.argv[2]))
