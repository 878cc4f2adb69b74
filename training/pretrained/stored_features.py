"""Features that a teacher has left of a run's images, by `hf-vicreg embed`."""

import logging
from pathlib import Path

import torch

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.features import SHARDS, embedded_rows, shard_digests
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.run.places import EMBEDDING_FILE, absence
from hf_vicreg.training.run.run_folder import read_record

logger = logging.getLogger(__name__)

FIELD = "teacher_features"
NUM_COMPARED = 256  # images whose bytes are compared with those embedded


def stored_features(folder: Path, source: ImageSource) -> torch.Tensor:
    """Return the features of all images of a source, `(images, features)` float32, from a folder of embeddings.

    An image without any, because it could not be read then, gets the mean of the others.

    Args:
        folder: Of `hf-vicreg embed`, of these images and perhaps of more behind them.
        source: The images.

    Raises:
        InputError: No such folder, an unfinished one, or one of other images.
    """
    if not (folder / EMBEDDING_FILE).is_file():
        raise InputError(
            f"`{FIELD}`: expected a folder of `hf-vicreg embed IMAGES TEACHER FOLDER`, got {str(folder)!r}"
            f"{absence(str(folder)) or ', which holds no embedding.json.'}"
        )
    record = read_record(FIELD, folder / EMBEDDING_FILE)
    if "num_rows" not in record:
        raise InputError(f"`{FIELD}`: expected finished ones, found only a part in {folder}; go on with the embed.")
    digests = [one for shard in sorted(folder.glob(SHARDS)) for one in shard_digests(shard)]
    step = -(-len(source) // NUM_COMPARED)
    other = next(
        (
            index
            for index in range(0, len(source), step)
            if index >= len(digests) or digests[index] != source.digest(index)
        ),
        len(digests) if len(digests) < len(source) else None,
    )
    if other is not None:
        raise InputError(
            f"`{FIELD}`: expected those of the {len(source)} images of {source.name} in {folder}, found "
            f"{len(digests)}, and {source.describe(other)} is another one or missing; embed these images with the "
            "teacher."
        )
    indices, values = embedded_rows(folder)
    kept = indices < len(source)
    indices, values = indices[kept], values[kept]
    if not len(indices):
        raise InputError(f"`{FIELD}`: expected features of these images in {folder}, found none; check the images.")
    found = values.mean(0).repeat(len(source), 1)
    found[indices] = values
    if len(indices) < len(source):
        logger.warning(
            "%d images have no features in %s; the mean stands for them", len(source) - len(indices), folder
        )
    return found
