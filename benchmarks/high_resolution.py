"""What sparse against dense encoders at 512 pixels need: crops of that size with masks, and one encoder in two forms.

    python -m benchmarks.high_resolution --dataset_name NUCLEI_FOLDER --out runs/high_resolution

`images`: an image of at least 512 pixels each way gives as many crops side by side as fit, centred; smaller images
give none; the splits stay as they are. `sparse` and `dense`: the encoder `nuclei` that comes with the package, with
tiles of 8x8 patches and with dense attention; the weights are the same. What is trained on them:
`benchmarks/evidence.sh high_resolution`.
"""

import argparse
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoImageProcessor, AutoModel

import hf_vicreg  # noqa: F401  registers the model
from hf_vicreg.model_cards.shipped import located

SIDE = 512
FORMS: dict[str, dict[str, Any]] = {
    "sparse": {"attention_type": "block_sparse", "tile_size": 8, "num_random_blocks": 3},
    "dense": {"attention_type": "original_full"},
}


def crops_of(rows: dict[str, list[Any]], image: str, mask: str) -> dict[str, list[Any]]:
    """Return the crops of a batch of one row, images and masks alike."""
    (picture,), (numbers,) = rows[image], rows[mask]
    across, down = (length // SIDE for length in picture.size)
    left, top = (picture.width - across * SIDE) // 2, (picture.height - down * SIDE) // 2
    boxes = [
        (left + column * SIDE, top + row * SIDE, left + (column + 1) * SIDE, top + (row + 1) * SIDE)
        for row in range(down)
        for column in range(across)
    ]
    return {image: [picture.crop(box) for box in boxes], mask: [numbers.crop(box) for box in boxes]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True, help="folder or Hub id with images and masks")
    parser.add_argument("--image_column_name", default="image")
    parser.add_argument("--mask_column_name", default="instances")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    images = arguments.out / "images"
    images.mkdir(parents=True)
    columns = [arguments.image_column_name, arguments.mask_column_name]
    for split, data in datasets.load_dataset(arguments.dataset_name).items():
        cut = data.select_columns(columns).map(
            crops_of,
            batched=True,
            batch_size=1,
            features=datasets.Features({name: datasets.Image() for name in columns}),
            fn_kwargs=dict(zip(("image", "mask"), columns, strict=True)),
        )
        cut.to_parquet(images / f"{split}.parquet")
        print(f"{split}: {len(cut)} crops of {SIDE}x{SIDE} pixels from {len(data)} images")
    size = {"height": SIDE, "width": SIDE}
    for name, fields in FORMS.items():
        encoder = AutoModel.from_pretrained(located("nuclei"), image_size=SIDE, **fields)
        encoder.save_pretrained(arguments.out / name)
        AutoImageProcessor.from_pretrained(located("nuclei"), size=size).save_pretrained(arguments.out / name)


if __name__ == "__main__":
    main()
