"""A figure of the pictures that words find.

python -m benchmarks.retrieved_pictures MODEL EMBEDDINGS FOLDER --queries "a red ring" --out found.png

FOLDER holds the images that `hf-vicreg embed FOLDER MODEL EMBEDDINGS` embedded.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from hf_vicreg.training.image_text.search import search


def main() -> None:
    """Draw a row for each query, its nearest pictures from left to right."""
    parser = argparse.ArgumentParser(description="A figure of the pictures that words find.")
    parser.add_argument("model")
    parser.add_argument("embeddings")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--queries", nargs="+", required=True)
    parser.add_argument("--num_results", type=int, default=5)
    parser.add_argument("--out", required=True, help="PNG file to write")
    arguments = parser.parse_args()
    rows = len(arguments.queries)
    figure = Figure(figsize=(1 + arguments.num_results, rows), layout="constrained")
    panels = figure.subplots(rows, arguments.num_results, squeeze=False)
    for row, query in zip(panels, arguments.queries, strict=True):
        for panel, found in zip(
            row, search(arguments.model, arguments.embeddings, query, arguments.num_results), strict=True
        ):
            with Image.open(arguments.folder / found.place) as image:
                panel.imshow(image.convert("RGB"))
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_xlabel(f"{found.cosine:.2f}", fontsize=7, labelpad=1)
        row[0].set_ylabel(query, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(arguments.out, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
