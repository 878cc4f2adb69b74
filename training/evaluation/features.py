"""Features of a split, extracted once: cached under a key of model, preprocessing and the images' bytes."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import VisionEncoder
from hf_vicreg.training.evaluation.knn import encoded_batches
from hf_vicreg.training.evaluation.labelled import LabelledImages
from hf_vicreg.training.progress import Progress

logger = logging.getLogger(__name__)


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
            f"`{images.split}`: expected readable images in {images.source.name}, all {total} are corrupt; check them."
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
