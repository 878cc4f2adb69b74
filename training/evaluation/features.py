"""Features of images, encoded batch after batch; those of a split are cached by model, preprocessing and bytes.

`hf-vicreg embed` stores features in a folder, from which `read_embeddings` takes them: `embedding.json` says of which
model and images they are, and `data/` has parquet shards, each with a digest of every image that it covers.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_vicreg.modeling.modeling_vicreg import pooled_features
from hf_vicreg.training.errors import InputError, blamed_on
from hf_vicreg.training.evaluation.encoder import VisionEncoder
from hf_vicreg.training.evaluation.labelled import LabelledImages
from hf_vicreg.training.images.channels.raster import arrays_of
from hf_vicreg.training.images.image_source import DIGEST_BYTES, NOT_READ, ImageSource
from hf_vicreg.training.images.unusable import none_readable
from hf_vicreg.training.monitor.progress import Progress
from hf_vicreg.training.run.places import EMBEDDING_FILE
from hf_vicreg.training.run.run_folder import read_record, refuse_others

logger = logging.getLogger(__name__)

BATCH_SIZE = 64
SHARDS = "data/train-*-of-*.parquet"  # in a folder of embeddings
DIGESTS = b"image_digests"  # in a shard's metadata: of the images it covers, in hexadecimal, one after the other


@dataclass(frozen=True)
class Features:
    """Features of the readable images of a split.

    Attributes:
        values: `(images, features)` float32, on the CPU.
        labels: `(images,)` int64.
        indices: `(images,)` int64, where each image is in the split.
    """

    values: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)


def load_features(
    images: LabelledImages, encoder: VisionEncoder, cache_dir: str | os.PathLike | None, batch_size: int
) -> Features:
    """Return the features of a split, from the cache where it has them.

    Args:
        images: The split.
        encoder: What encodes it.
        cache_dir: Folder of the cache; None is `hf_vicreg/features` in `HF_HOME`.
        batch_size: Images encoded at once.

    Raises:
        InputError: Not one readable image, or features that are not finite.
    """
    folder = Path(cache_dir) if cache_dir is not None else Path(constants.HF_HOME) / "hf_vicreg" / "features"
    path = folder / f"{cache_key(images, encoder)}.safetensors"
    tensors = _read(path)
    if tensors is None:
        tensors = _extract(images, encoder, batch_size)
        _write(path, tensors)
    else:
        logger.info("features of split %r: found in %s", images.split, path)
    labels = torch.tensor(images.labels, dtype=torch.int64)[tensors["indices"]]
    return Features(tensors["features"], labels, tensors["indices"])


def cache_key(images: LabelledImages, encoder: VisionEncoder) -> str:
    """Return the name under which features are cached; labels do not matter to them."""
    parts = [encoder.weights, encoder.feature, encoder.preprocessing, images.fingerprint]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def shard_digests(shard: Path) -> list[bytes]:
    """Return the digest of every image that a shard of embeddings covers, with a row or without.

    Raises:
        InputError: It is damaged.
    """
    import pyarrow.parquet

    with blamed_on("embeddings", f"expected a whole shard in {shard}, which is damaged; delete it and embed again"):
        joined = bytes.fromhex((pyarrow.parquet.read_schema(shard).metadata or {}).get(DIGESTS, b"none").decode())
    return [joined[start : start + DIGEST_BYTES] for start in range(0, len(joined), DIGEST_BYTES)]


def same_model(described: dict[str, Any]) -> dict[str, Any]:
    """Return what of a model's description, of `VisionEncoder.describe`, makes its features."""
    return {key: described[key] for key in ("weights", "feature", "preprocessing")}


def read_embeddings(folder: Path, images: LabelledImages, encoder: VisionEncoder) -> Features:
    """Return the features of a split from a folder of `hf-vicreg embed`, checked against model and bytes.

    Args:
        folder: Of embeddings of these images, and perhaps of more behind them.
        images: The split.
        encoder: The model that they have to be of.

    Raises:
        InputError: Embeddings of another model or other images, or unfinished ones.
    """
    record = read_record("embeddings", folder / EMBEDDING_FILE)
    remedy = f"embed split {images.split!r} with this model"
    refuse_others("embeddings", folder, record, {"model": same_model(encoder.describe())}, remedy)
    if "num_rows" not in record:
        raise InputError(f"`embeddings`: expected finished ones, found only a part in {folder}; go on with the embed.")
    shards = sorted(folder.glob(SHARDS))
    digests = [one for shard in shards for one in shard_digests(shard)]
    for index, wanted in enumerate(images.digests):
        found = digests[index] if index < len(digests) else None
        unread = found == NOT_READ and images.source.digest(index) == NOT_READ  # then as now
        if found != wanted[:DIGEST_BYTES] and not unread:
            raise InputError(
                f"`embeddings`: expected those of the {len(images.source)} images of split {images.split!r} in "
                f"{folder}, found {len(digests)}, of which image {index} is another one or missing; {remedy}."
            )
    indices, values = embedded_rows(folder)
    kept = indices < len(images.source)
    indices, values = indices[kept], values[kept]
    logger.info("features of split %r: %d of %s, %s", images.split, len(indices), folder, record.get("dtype"))
    return Features(values, torch.tensor(images.labels, dtype=torch.int64)[indices], indices)


def embedded_rows(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids `(rows,)` int64 and embeddings `(rows, features)` float32 of a folder of `hf-vicreg embed`."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(sorted(folder.glob(SHARDS)), columns=["id", "embedding"])
    indices = torch.tensor(table["id"].to_numpy())
    values = torch.tensor(table["embedding"].combine_chunks().flatten().to_numpy()).float()
    return indices, values.view(len(indices), -1)


def _extract(images: LabelledImages, encoder: VisionEncoder, batch_size: int) -> dict[str, torch.Tensor]:
    total, values, indices = len(images.source), [], []
    progress = Progress(total, 0, shown=True)
    progress.describe(f"encoding split {images.split!r}")
    for start, found, features in encoded_batches(images.source, encoder.processor, encoder, batch_size=batch_size):
        indices += found
        values.append(features)
        progress.update(min(total, start + batch_size))
    progress.close()
    if not indices:
        raise InputError(
            f"`{images.split}`: expected readable images in {images.source.name}, {none_readable(images.source)}."
        )
    if len(indices) < total:
        logger.warning("split %r: %d of %d images are corrupt and left out", images.split, total - len(indices), total)
    features = torch.cat(values)
    if not features.isfinite().all():
        raise InputError("`MODEL`: expected finite features, found NaN or infinity; its weights are damaged.")
    return {"features": features, "indices": torch.tensor(indices, dtype=torch.int64)}


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in ("features", "indices")}
    except (SafetensorError, OSError) as error:
        logger.warning("cached features %s are damaged and made again: %s", path, error)
        return None


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write aside and rename: another process may be reading, and a kill must leave nothing half-written."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        logger.warning("features are not cached, %s cannot be written: %s", path, error)


@torch.no_grad()
def encode(
    source: ImageSource,
    processor: Callable[..., Any],
    encode_pixels: Callable[[torch.Tensor], torch.Tensor],
    *,
    share: tuple[int, int] = (0, 1),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features and labels of a labelled source's readable images, in its order, on the CPU.

    Args:
        source: Images with labels.
        processor: Turns a list of images into `pixel_values`.
        encode_pixels: `(batch, channels, height, width)` to `(batch, features)`.
        share: As for `encoded_batches`.

    Returns:
        `(images, features)` float32 and `(images,)` int64.
    """
    assert source.labels is not None
    features, labels = [torch.empty(0, 0)], []
    for _, indices, encoded in encoded_batches(source, processor, encode_pixels, share=share):
        features.append(encoded)
        labels += [source.labels[index] for index in indices]
    return torch.cat(features[1:] or features), torch.tensor(labels, dtype=torch.int64)


@torch.no_grad()
def encoded_batches(
    source: ImageSource,
    processor: Callable[..., Any],
    encode_pixels: Callable[[torch.Tensor], torch.Tensor],
    *,
    share: tuple[int, int] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Iterator[tuple[int, list[int], torch.Tensor]]:
    """Yield batch after batch of a source: how many images came before, indices of its readable images, features.

    Which kernels a processor takes, and with them the last bits of the features, depends on the shape of a batch. So
    batches are cut the same way for any number of processes, and one with too few images is filled up with copies:
    the features are the same however many processes share the work.

    Args:
        source: Images.
        processor: Turns a list of images into `pixel_values`.
        encode_pixels: `(batch, channels, height, width)` to `(batch, features)`.
        share: (rank, processes): every how-manieth batch, and from which on, this call encodes.
        batch_size: Images of every batch.

    Yields:
        Images of the share before this batch, indices in the source, `(readable images, features)` float32 on the CPU.
    """
    rank, processes = share
    for turn, start in enumerate(range(rank * batch_size, len(source), processes * batch_size)):
        read = [(index, source.read(index)) for index in range(start, min(start + batch_size, len(source)))]
        readable = [index for index, image in read if image is not None]
        if readable:
            filled = pixels_of([image for _, image in read if image is not None], processor, batch_size)
            yield turn * batch_size, readable, encode_pixels(filled)[: len(readable)].float().cpu()


def pixels_of(images: list[Image.Image], processor: Callable[..., Any], batch_size: int) -> torch.Tensor:
    """Return pixel values `(batch_size, channels, height, width)`: the images', then copies to fill the batch up."""
    arrays, axes = arrays_of(images)
    pixel_values = processor(arrays, return_tensors="pt", **axes)["pixel_values"]
    if len(images) == batch_size:
        return pixel_values
    return pixel_values[torch.arange(batch_size) % len(images)]


def model_encoder(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from pixel values to the pooled features of any vision encoder, in evaluation mode."""

    def encode_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
        was_training = model.training
        model.eval()
        features = pooled_features(model(pixel_values.to(model.device)))
        model.train(was_training)
        return features

    return encode_pixels
