"""The parquet shards of `hf-vicreg embed`: their columns, and one of them in memory."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_vicreg.training.errors import InputError, blamed_on
from hf_vicreg.training.evaluation.features import DIGESTS, shard_digests
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.prepare.embedding_batches import Batch, Form
from hf_vicreg.training.prepare.store import write_whole


class ShardRows:
    """The rows of one shard as they come; memory is taken once.

    Attributes:
        digests: One of each image so far, with a row or without.
    """

    def __init__(self, source: ImageSource, form: Form, num_images: int):
        self.source, self.form = source, form
        self.digests: list[bytes] = []
        self.ids: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.embeddings = np.empty((num_images, form.size), form.dtype)
        self.tokens = None if form.tokens is None else np.empty((num_images, *form.tokens), "float16")
        self.inner = np.empty((num_images, sum(form.inner)), "float32") if form.inner else None

    def add(self, batch: Batch) -> None:
        """Add the rows of a batch.

        Raises:
            InputError: Embeddings that are not finite, or not within the range of their type; tokens of another grid.
        """
        self.digests += batch.digests
        if batch.values is None:
            return
        place = slice(len(self.ids), len(self.ids) + len(batch.indices))
        values = batch.values.numpy()
        if not np.isfinite(values).all():
            raise InputError("`MODEL`: expected finite embeddings, found NaN or infinity; its weights are damaged.")
        largest = float(np.abs(values).max())
        if largest > float(np.finfo(self.form.dtype).max):
            raise InputError(
                f"`dtype`: expected embeddings within the range of float16, found {largest:g}; use --dtype float32."
            )
        self.embeddings[place] = values
        if self.tokens is not None:
            assert batch.tokens is not None
            tokens = batch.tokens.numpy()
            expected = self.tokens.shape[1:]
            if tokens.shape[1:] != expected:
                raise InputError(
                    f"`patch_tokens`: expected the same grid of patches for all images, {expected[:2]}, found "
                    f"{tokens.shape[1:3]}; let the image processor give one size, or leave them out."
                )
            if not np.isfinite(tokens).all():
                raise InputError("`patch_tokens`: expected tokens within the range of float16; leave them out.")
            self.tokens[place] = tokens
        if self.inner is not None:
            assert batch.inner is not None
            self.inner[place] = batch.inner.numpy()
        self.ids += batch.indices
        self.sizes += batch.sizes

    def table(self) -> Any:
        """Return the shard as an Arrow table, digests and the columns' features in its metadata."""
        import pyarrow

        features = _features(self.source, self.form)
        digests = {DIGESTS: b"".join(self.digests).hex().encode()}
        schema, count = features.arrow_schema, len(self.ids)
        columns: dict[str, Any] = {
            "id": pyarrow.array(self.ids, "int64"),
            "path": pyarrow.array([_path(self.source, index) for index in self.ids], "string"),
            "height": pyarrow.array([height for height, _ in self.sizes], "int32"),
            "width": pyarrow.array([width for _, width in self.sizes], "int32"),
            "embedding": _nested(self.embeddings[:count], schema.field("embedding").type),
        }
        if self.source.labels is not None:
            columns["label"] = pyarrow.array([self.source.labels[index] for index in self.ids], "int64")
        if self.tokens is not None:
            columns["patch_tokens"] = _nested(self.tokens[:count], schema.field("patch_tokens").type)
        if self.inner is not None:
            columns["inner_layers"] = _nested(self.inner[:count], schema.field("inner_layers").type)
        return pyarrow.table(columns, schema=schema.with_metadata(schema.metadata | digests))


def _features(source: ImageSource, form: Form) -> Any:
    """Return what tells `datasets` what the columns are."""
    from datasets import ClassLabel, Features, List, Value

    columns: dict[str, Any] = {
        "id": Value("int64"),
        "path": Value("string"),
        "height": Value("int32"),
        "width": Value("int32"),
        "embedding": List(Value(form.dtype), length=form.size),
    }
    if source.labels is not None:
        columns["label"] = Value("int64") if source.label_names is None else ClassLabel(names=source.label_names)
    if form.tokens is not None:
        rows, grid_columns, size = form.tokens
        columns["patch_tokens"] = List(List(List(Value("float16"), length=size), length=grid_columns), length=rows)
    if form.inner:
        columns["inner_layers"] = List(Value("float32"), length=sum(form.inner))
    return Features(columns)


def _nested(values: np.ndarray, kind: Any) -> Any:
    """Return an array `(images, ...)` as nested lists of fixed length, without copying it."""
    import pyarrow

    if values.ndim == 1:
        return pyarrow.array(values)
    inner = _nested(values.reshape(-1, *values.shape[2:]), kind.value_type)
    return pyarrow.FixedSizeListArray.from_arrays(inner, type=kind)


def _path(source: ImageSource, index: int) -> str:
    """Return what a user finds an image by; a file system's name need not be text."""
    return source.describe(index).encode(errors="surrogateescape").decode(errors="replace")


def write_shard(path: Path, rows: ShardRows) -> None:
    """Write a shard, completely or not at all.

    Raises:
        OSError: No room.
    """
    import pyarrow.parquet

    # numbers of a network do not repeat: neither a dictionary nor compression makes them smaller
    options = {"compression": "none", "use_dictionary": False}
    write_whole(path, partial(pyarrow.parquet.write_table, rows.table(), **options))


def digests_of(source: ImageSource, indices: range) -> list[bytes]:
    """Return the digests of some images, read by several threads."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(source.digest, indices))


def first_changed(source: ImageSource, indices: range, shard: Path) -> int | None:
    """Return the first of the images that is not the one that the shard was made of, None if all are.

    Raises:
        InputError: The shard is damaged.
    """
    stored = shard_digests(shard)
    found = zip_longest(indices, stored, digests_of(source, indices))
    return next((indices[0] if index is None else index for index, old, new in found if old != new), None)


def embedded_ids(shards: list[Path]) -> set[int]:
    """Return the ids of all rows of some shards.

    Raises:
        InputError: One is damaged or missing.
    """
    import pyarrow.parquet

    with blamed_on("OUT", "expected whole shards; delete the damaged one and embed again"):
        return set(pyarrow.parquet.read_table(shards, columns=["id"])["id"].to_pylist())
