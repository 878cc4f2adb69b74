"""The training images of a dataset as files, as a run that reads windows wants them.

    python -m benchmarks.bccd BCCD_FOLDER runs/bccd_images

What is trained on them, and on the boxes: `benchmarks/evidence.sh bccd`.
"""

import argparse
from pathlib import Path

import datasets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset_name", help="folder or Hub id with images and boxes")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    images = datasets.load_dataset(arguments.dataset_name, split="train")["image"]
    for number, image in enumerate(images):
        image.save(arguments.out / f"{number:03d}.png")
    print(f"{len(images)} training images in {arguments.out}")


if __name__ == "__main__":
    main()
