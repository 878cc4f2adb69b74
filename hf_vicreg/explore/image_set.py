"""The images of an explorer: their embeddings in a folder of `hf-vicreg embed`, and their files where at hand."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_vicreg.explore.named import check_images
from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.training.errors import InputError, blamed_on
from hf_vicreg.training.evaluation.encoder import VisionEncoder, load_vision_encoder, source_for
from hf_vicreg.training.evaluation.features import SHARDS, same_model, shard_digests
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.prepare.arguments import EmbedArguments
from hf_vicreg.training.prepare.embed import embed_images, load_images
from hf_vicreg.training.run.places import EMBEDDING_FILE
from hf_vicreg.training.run.run_folder import read_record, refuse_others

TOLD = {"dtype", "size", "num_unusable", "name", "weights", "feature", "preprocessing"}  # by embedding.json


@dataclass(frozen=True)
class ImageSet:
    """Embedded images by row, from 0 on, in the order of their source.

    Attributes:
        folder: Of `hf-vicreg embed`.
        record: What its `embedding.json` says.
        ids: `(images,)` int64, the place of each row in the source.
        paths: What each was called when it was embedded.
        digests: Of each image's bytes.
        source: The images themselves, None where they are not at hand.
        encoder: What they were embedded with, None where it is not at hand.
    """

    folder: Path
    record: dict[str, Any]
    ids: np.ndarray
    paths: list[str]
    digests: list[bytes]
    source: ImageSource | None
    encoder: VisionEncoder | None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def title(self) -> str:
        """What the images are called."""
        return one_line(self.record["images"]["name"])

    @property
    def num_unreadable(self) -> int:
        """How many images of the source have no row."""
        return int(self.record["num_unusable"])

    @cached_property
    def key(self) -> str:
        """A hash of the embeddings: of model, preprocessing, type and the bytes of every image."""
        wanted = {name: self.record[name] for name in ("dtype", "size")} | same_model(self.record["model"])
        wanted |= {"inner_layers": self.record.get("inner_layers")}
        digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode())
        for one in (self.ids.tobytes(), *self.digests):
            digest.update(one)
        return digest.hexdigest()[:32]

    def file_name(self, row: int) -> str:
        """Return what a user finds an image by, exactly as the file system has it."""
        return self.paths[row] if self.source is None else self.source.describe(int(self.ids[row]))

    def shown_name(self, row: int) -> str:
        """Return the same as text on one line, with nothing in it that steers anything."""
        return one_line(self.file_name(row))

    def embeddings(self) -> np.ndarray:
        """Return the embeddings `(images, features)` float32 as the encoder gave them, read from the folder.

        Raises:
            InputError: A damaged shard, or an embedding without a direction.
        """
        column = _columns(self.folder, ["embedding"])["embedding"].combine_chunks()
        values = column.flatten().to_numpy().astype(np.float32).reshape(len(self), -1)
        lengths = np.linalg.norm(values, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or not lengths.all():
            raise InputError(f"`IMAGES`: expected embeddings with a direction in {self.folder}, found 0 or NaN.")
        return values

    def inner_layers(self) -> list[np.ndarray]:
        """Return the mean tokens of two inner layers, `(images, features)` float32 each; none where not stored.

        Raises:
            InputError: A damaged shard, or something else than numbers of that size.
        """
        sizes = self.record.get("inner_layers")
        if not sizes:
            return []
        values = _columns(self.folder, ["inner_layers"])["inner_layers"].combine_chunks().flatten().to_numpy()
        whole = isinstance(sizes, list) and all(isinstance(one, int) for one in sizes)
        if not whole or values.size != sum(sizes) * len(self) or not np.isfinite(values).all():
            raise InputError(f"`IMAGES`: expected whole features of inner layers in {self.folder}; embed again.")
        return np.split(values.reshape(len(self), -1), np.cumsum(sizes)[:-1], axis=1)


def open_set(images: str, model: str | None, data: str | None, arguments: EmbedArguments) -> ImageSet:
    """Return the images that a call names, embedded now unless they are embedded already.

    Args:
        images: Images as of `hf-vicreg embed`, or a folder that it made.
        model: Folder or Hub id of the encoder; needed for images, and for what is dropped in or put in words.
        data: Of a folder of embeddings, the images themselves.
        arguments: How images are embedded and read.

    Raises:
        InputError: No images, no model where one is needed, embeddings of another model or of other images.
    """
    device = None if arguments.device == "auto" else torch.device(arguments.device)
    if not (Path(images) / EMBEDDING_FILE).is_file():
        check_images(images, model, data)
        assert model is not None
        done = embed_images(images, model, None, replace(arguments, inner_layers=True))
        encoder = load_vision_encoder(model, device)
        source = source_for(encoder.processor, load_images(images, arguments, encoder.processor))
        return _read_set(done.folder, source, encoder)
    folder = Path(images)
    encoder_at_hand = None if model is None else load_vision_encoder(model, device)
    record = read_record("IMAGES", folder / EMBEDDING_FILE)
    if encoder_at_hand is not None:
        expected = {"model": same_model(encoder_at_hand.describe())}
        refuse_others("IMAGES", folder, record, expected, f"name the model of these embeddings, or embed with {model}")
    at_hand = None
    if data is not None:
        processor = None if encoder_at_hand is None else encoder_at_hand.processor
        at_hand = load_images(data, arguments, processor)
        at_hand = at_hand if processor is None else source_for(processor, at_hand)
        told: Any = record.get("images") if isinstance(record.get("images"), dict) else {}
        if told.get("fingerprint") != at_hand.fingerprint:
            raise InputError(
                f"`data`: expected the images that {folder} was made of, {told.get('num_images')} of "
                f"{one_line(told.get('name'))}, found others in {data}: {len(at_hand)}, or changed since."
            )
    return _read_set(folder, at_hand, encoder_at_hand)


def _read_set(folder: Path, source: ImageSource | None, encoder: VisionEncoder | None) -> ImageSet:
    record = read_record("IMAGES", folder / EMBEDDING_FILE)
    if "num_rows" not in record:
        raise InputError(f"`IMAGES`: expected finished embeddings, found only a part in {folder}; embed again.")
    model, told = record.get("model"), record.get("images")
    if not isinstance(model, dict) or not isinstance(told, dict) or TOLD - {*record, *model, *told}:
        raise InputError(f"`IMAGES`: expected {EMBEDDING_FILE} of `hf-vicreg embed` in {folder}; embed again.")
    table = _columns(folder, ["id", "path"])
    ids = table["id"].to_numpy()
    digests = [one for shard in sorted(folder.glob(SHARDS)) for one in shard_digests(shard)]
    if len(ids) != record["num_rows"] or (len(ids) and ids.max() >= len(digests)):
        raise InputError(f"`IMAGES`: expected {record['num_rows']} embeddings in {folder}, found {len(ids)}.")
    paths = [path or f"row {place}" for path, place in zip(table["path"].to_pylist(), ids.tolist(), strict=True)]
    return ImageSet(folder, record, ids, paths, [digests[place] for place in ids.tolist()], source, encoder)


def _columns(folder: Path, names: list[str]) -> Any:
    import pyarrow.parquet

    with blamed_on("IMAGES", f"expected whole shards in {os.fspath(folder)}; embed again"):
        return pyarrow.parquet.read_table(sorted(folder.glob(SHARDS)), columns=names)
