"""`hf-vicreg search`: words find images among the embeddings that `hf-vicreg embed` has made."""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from hf_vicreg.training.errors import InputError, blamed_on
from hf_vicreg.training.evaluation.encoder import weights_digest
from hf_vicreg.training.evaluation.exact_cosine import exact_cosines
from hf_vicreg.training.evaluation.features import EMBEDDING_FILE
from hf_vicreg.training.image_text.dual import load_dual
from hf_vicreg.training.run.run_folder import read_record


class Found(NamedTuple):
    """An image that was found.

    Attributes:
        cosine: Between words and image.
        id: The image's place among those that were embedded.
        place: Its file, or `row ID` where images are no files.
    """

    cosine: float
    id: int
    place: str


def search(model: str | os.PathLike, embeddings: str | os.PathLike, words: str, num_results: int = 10) -> list[Found]:
    """Return the images that are nearest to some words, the nearest first.

    Args:
        model: Folder or Hub id of a model of images and texts.
        embeddings: Folder that `hf-vicreg embed` made with it.
        words: What the images shall show.
        num_results: How many to return, at most.

    Raises:
        InputError: No words, no such model, or embeddings of another one.
    """
    import datasets

    folder = Path(embeddings)
    if not words.strip():
        raise InputError("`WORDS`: expected some words, got none.")
    if num_results < 1:
        raise InputError(f"`num_results`: expected at least 1, got {num_results}.")
    if not (folder / EMBEDDING_FILE).exists():
        raise InputError(f"`EMBEDDINGS`: expected a folder of `hf-vicreg embed`, {folder} has no {EMBEDDING_FILE}.")
    record, dual = read_record("EMBEDDINGS", folder / EMBEDDING_FILE), load_dual(os.fspath(model))
    if (record.get("model") or {}).get("weights") != weights_digest(dual.model):
        raise InputError(f"`EMBEDDINGS`: expected embeddings of {model}, {folder} has another model's; embed again.")
    with blamed_on("EMBEDDINGS", f"expected finished embeddings in {folder}"):
        rows = datasets.load_dataset(str(folder), split="train")
    bank = torch.from_numpy(rows.with_format("numpy")["embedding"][:].astype("float32"))
    cosines = torch.cat([found for _, found in exact_cosines(bank, dual.texts([words]))])[0]
    nearest = cosines.topk(min(num_results, len(bank)))
    found = []
    for cosine, row in zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True):
        entry = rows.select_columns(["id", "path"])[row]
        found.append(Found(cosine, entry["id"], entry["path"] or f"row {entry['id']}"))
    return found
