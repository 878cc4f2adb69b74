"""How many planted copies, crops and odd images the explorer's lists find.

    python -m benchmarks.planted cifar10 --odd emoji nuclei --draws 10 --out benchmarks/results/planted.json

Into 200 images of a data set's test split go 10 identical copies, 10 crops of seven eighths of the side, enlarged and
encoded anew as JPEG, and 5 odd images: of the other data sets in turn, and noise. Found is what the page of
`hf-vicreg explore` lists: groups of copies at its own threshold, and the 60 images with the most unusual features.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from PIL import Image

import hf_vicreg
from benchmarks.measuring import machine
from hf_vicreg.explore.explorer import open_explorer

IMAGES, COPIES, CROPS, ODD = 200, 10, 10, 5


def plant(folder: Path, images: list[Image.Image], odd: list[Image.Image], rng: random.Random) -> dict[str, list[str]]:
    """Write the images and what is planted; return the names of the planted files."""
    for index, image in enumerate(images):
        image.save(folder / f"own_{index:03d}.png")
    chosen = rng.sample(range(len(images)), COPIES + CROPS)
    for index in chosen[:COPIES]:
        (folder / f"copy_{index:03d}.png").write_bytes((folder / f"own_{index:03d}.png").read_bytes())
    for index in chosen[COPIES:]:
        image = images[index]
        (width, height), left, top = image.size, rng.random(), rng.random()
        across, down = width - width // 8, height - height // 8
        x, y = round(left * (width - across)), round(top * (height - down))
        crop = image.crop((x, y, x + across, y + down)).resize((width, height), Image.Resampling.BICUBIC)
        crop.save(folder / f"crop_{index:03d}.jpg", quality=85)
    for number, image in enumerate(odd):
        image.convert("RGB").save(folder / f"odd_{number}.png")
    return {
        "copies": [f"{index:03d}" for index in chosen[:COPIES]],
        "crops": [f"{index:03d}" for index in chosen[COPIES:]],
    }


def found_in(folder: Path, model: str, planted: dict[str, list[str]]) -> dict[str, Any]:
    """Return how many of each are in the explorer's lists, and how many groups of copies hold nothing planted."""
    explorer = open_explorer(str(folder), model)
    names = [explorer.images.file_name(row) for row in range(len(explorer))]
    groups = [{Path(names[row]).stem for row in group} for group in explorer.copies().groups]
    counts: dict[str, Any] = {
        kind: sum(any({f"own_{one}", f"{kind_name}_{one}"} <= group for group in groups) for one in planted[kind])
        for kind, kind_name in (("copies", "copy"), ("crops", "crop"))
    }
    counts["other_groups"] = sum(not any(name.startswith(("copy", "crop")) for name in group) for group in groups)
    places = [place for place, (row, _) in enumerate(explorer.outliers()) if names[row].startswith("odd")]
    return counts | {"odd": len(places), "odd_in_first_ten": sum(place < 10 for place in places)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder that `datasets` loads, with a split `test`")
    parser.add_argument("--odd", nargs="+", required=True, help="other such folders, for odd images")
    parser.add_argument("--model", default="cifar10_cpu", help="encoder of the package, or a folder")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--first_seed", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    model = asked.model if Path(asked.model).is_dir() else hf_vicreg.load(asked.model).name_or_path
    own, *others = (load_dataset(one, split="test") for one in (asked.data, *asked.odd))
    rows = []
    for seed in range(asked.first_seed, asked.first_seed + asked.draws):
        rng = random.Random(seed)
        images = [own[index]["image"].convert("RGB") for index in rng.sample(range(len(own)), IMAGES)]
        odd = [others[turn % len(others)] for turn in range(ODD - 1)]
        strange = [one[rng.randrange(len(one))]["image"].convert("RGB").resize(images[0].size) for one in odd]
        noise = np.random.default_rng(seed).integers(0, 256, (*images[0].size[::-1], 3), dtype=np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            planted = plant(Path(folder), images, [*strange, Image.fromarray(noise)], rng)
            rows.append({"seed": seed, **found_in(Path(folder), str(model), planted)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    asked.out.write_text(json.dumps({"machine": machine("cpu"), "model": asked.model, "draws": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
