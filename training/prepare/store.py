"""A set of images, resized or cut into windows once, as parquet shards: `hf-vicreg prepare SOURCE OUT`.

Reading and shrinking large originals is most of what a loader does; done once, it is not done in every epoch. The
result is a local `datasets` folder (`--dataset_name OUT`). A shard covers a fixed range of the source's images and is
written aside, flushed and renamed: after a kill the complete ones are kept and the run goes on behind them.
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from hf_vicreg.training.errors import InputError, blamed_on
from hf_vicreg.training.images.channels.channel_source import ChannelSource
from hf_vicreg.training.images.sources import ImageSource, load_sources
from hf_vicreg.training.images.unusable import none_readable
from hf_vicreg.training.launch.cores import usable_cores
from hf_vicreg.training.monitor.progress import Progress
from hf_vicreg.training.prepare.channel_store import EncodedChannels, channel_images
from hf_vicreg.training.run.places import is_image_folder

logger = logging.getLogger(__name__)

IMAGES_A_SHARD, CHANNELS_A_SHARD = 2000, 32  # the latter are larger, and not shrunk
IMAGES_A_GROUP, BYTES_A_GROUP = 100, 2**28  # `datasets` reads a row group at once, and not more than 2 GiB
SIZE = 256  # pixels
IMAGES_A_BATCH = 16  # between processes
JPEG_QUALITY = 90
# Formats whose bytes are stored as they are when the image is small enough; others may be large for their pixels.
KEPT_FORMATS = {"JPEG", "PNG", "WEBP"}
WRITING = ".writing_"  # before the name of a file that is not there yet; `datasets` does not look at it
RECORD = ".prepared.json"  # hidden: `datasets` takes any other JSON file in the folder for data


@dataclass
class Prepared:
    """What `prepare` did.

    Attributes:
        images: Stored images by split.
        skipped: Images of each split that are corrupt or missing, by what a user finds them by.
        measured: Whether training has to measure their normalisation: they are not of 8 bits.
    """

    images: dict[str, int]
    skipped: dict[str, list[str]]
    measured: bool = False


def prepare(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    size: int | None = None,
    num_proc: int | None = None,
    num_channels: int | None = None,
    window: int | None = None,
    pages: str | None = None,
    **columns: Any,
) -> Prepared:
    """Store a set of images with a short side of at most `size` pixels, and its labels if it has some.

    With `num_channels` or `window` images of a folder are stored in their own depth, without loss and at their own
    size, larger ones by windows that hold something.

    Args:
        source: A folder of image files, a local `datasets` folder or a Hub id.
        out: New or empty folder, or one that an interrupted call with the same arguments left.
        size: Longest allowed short side in pixels (default: 256). Smaller images keep their own size, and their bytes
            if they are JPEG, PNG or WebP.
        num_proc: Processes that resize; default: as many as this one may use cores.
        num_channels: Of every image (3 where only `window` is given).
        window: Side in pixels of the windows that larger images are cut into.
        pages: What pages of a file are, `channels` or `images`; None tells it from the number of channels.
        columns: `dataset_config_name`, `train_split`, `test_split`, `image_column_name` and `label_column_name` as in
            `load_sources`.

    Raises:
        InputError: Nothing to read, nothing readable, or `out` holds something else.
        OSError: The disk is full; complete shards stay.
    """
    if size is not None and size < 1:
        raise InputError(f"`size`: expected at least 1 pixel, got {size}.")
    source, out = os.fspath(source), Path(out)
    by_channels = num_channels is not None or window is not None or pages is not None
    test: ImageSource | None = None
    if by_channels:
        if size is not None:
            raise InputError("`size`: expected none beside channels or windows, which are kept whole; leave it out.")
        train: ImageSource = channel_images(source, 3 if num_channels is None else num_channels, pages, window)
    elif is_image_folder(source):
        train, test = load_sources(train_dir=source)
    else:
        train, test = load_sources(dataset_name=source, **columns)
    splits = {"train": train} | ({"test": test} if test is not None else {})
    fingerprints = {name: one.fingerprint for name, one in splits.items()}
    each = CHANNELS_A_SHARD if by_channels else IMAGES_A_SHARD
    record = {"size": size or SIZE, "images_a_shard": each, "fingerprints": fingerprints}
    _open_folder(out, record)
    if num_proc is None:
        num_proc = usable_cores()
    prepared = Prepared({}, {})
    if isinstance(train, ChannelSource):
        prepared.measured = any(one.dtype != np.uint8 for one in _corners(train))
    for name, images in splits.items():
        small = EncodedChannels(images) if isinstance(images, ChannelSource) else _Resized(images, size or SIZE)
        skipped = _write_split(images, small, name, out, each, num_proc)
        prepared.skipped[name] = [images.describe(index) for index in skipped]
        prepared.images[name] = len(images) - len(skipped)
        if not prepared.images[name]:
            raise InputError(f"`source`: expected readable images in {images.name}, {none_readable(images)}.")
    return prepared


def _corners(images: ChannelSource) -> list[np.ndarray]:
    """Return a pixel of some images each."""
    found = [images.read(index) for index in images.sampled()[:16]]
    return [one.crop((0, 0, 1, 1)) for one in found if one is not None]


def _open_folder(out: Path, record: dict[str, Any]) -> None:
    """Make the folder, or check that it is of a call like this one."""
    if out.exists() and not out.is_dir():
        raise InputError(f"`out`: expected a folder, got {out}, which is a file.")
    if out.is_dir() and any(out.iterdir()):
        try:
            found = json.loads((out / RECORD).read_text())
        except (OSError, ValueError):
            raise InputError(f"`out`: expected a new or empty folder, {out} holds something else.") from None
        if found != record:
            raise InputError(
                f"`out`: {out} was begun from other images or with another size, window or channels; choose another "
                "folder."
            )
        remove_unfinished(out)
        return
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / RECORD, json.dumps(record).encode())


def _write_split(
    source: ImageSource, encoded_images: Dataset, split: str, out: Path, each: int, num_proc: int
) -> list[int]:
    """Write the shards of a split that are not there yet, of so many; return the indices of unusable images."""
    import pyarrow.parquet

    starts = range(0, len(source), each)
    features = _features(source)
    skipped: list[int] = []
    todo = []
    for shard, start in enumerate(starts):
        path = out / f"{split}-{shard:05d}-of-{len(starts):05d}.parquet"
        if path.exists():
            with blamed_on("out", f"expected a whole shard in {path}"):
                skipped += json.loads(pyarrow.parquet.read_schema(path).metadata[b"skipped"])
        else:
            todo.append((path, range(start, min(start + each, len(source)))))
    done = len(source) - sum(len(indices) for _, indices in todo)
    if done:
        logger.info("%s: %d of %d images are there already", split, done, len(source))
    progress = Progress(len(source), done, shown=True)
    loader = DataLoader(
        encoded_images,
        sampler=[index for _, indices in todo for index in indices],
        batch_size=IMAGES_A_BATCH,
        num_workers=num_proc if num_proc > 1 else 0,
        collate_fn=list,
    )
    resized = (entry for batch in loader for entry in batch)
    for path, indices in todo:
        rows, own_skipped, largest = [], [], 1
        for index in indices:
            encoded = next(resized)
            if encoded is None:
                own_skipped.append(index)
            else:
                label = {} if source.labels is None else {"label": source.labels[index]}
                largest = max(largest, len(encoded))
                rows.append({"image": {"bytes": encoded, "path": None}} | label)
            done += 1
            progress.update(done)
        metadata = features.metadata | {b"skipped": json.dumps(own_skipped).encode()}
        table = pyarrow.Table.from_pylist(rows, schema=features.with_metadata(metadata))
        # images are compressed already; small row groups let a stream be shuffled without reading a whole shard
        group = max(1, min(IMAGES_A_GROUP, BYTES_A_GROUP // largest))
        write_whole(path, partial(pyarrow.parquet.write_table, table, row_group_size=group, compression="none"))
        skipped += own_skipped
    progress.close()
    return sorted(skipped)


def _features(source: ImageSource) -> Any:
    """Return the Arrow schema of the shards, which tells `datasets` what the columns are."""
    import datasets

    columns: dict[str, Any] = {"image": datasets.Image()}
    if source.labels is not None:
        names = source.label_names
        columns["label"] = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    return datasets.Features(columns).arrow_schema


class _Resized(Dataset):
    """Encoded small images by index, None for unusable ones."""

    def __init__(self, source: ImageSource, size: int):
        self.source, self.size = source, size

    def __getitem__(self, index: int) -> bytes | None:
        image = self.source.read(index, self._reduction)
        if image is None:
            return None
        if min(image.size) <= self.size:
            encoded = self.source.read_bytes(index)
            with Image.open(BytesIO(encoded)) as original:
                if original.format in KEPT_FORMATS and min(original.size) <= self.size:
                    return encoded
        else:
            ratio = self.size / min(image.size)
            wanted = (round(image.width * ratio), round(image.height * ratio))
            image = image.resize(wanted, Image.Resampling.BICUBIC, reducing_gap=3.0)
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()

    def _reduction(self, width: int, height: int) -> int:
        return min(width, height) // self.size


def write_whole(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write a file completely or not at all: aside, flushed to disk, then renamed.

    Two processes that write the same file do not disturb each other.

    Args:
        path: Where.
        content: Bytes, or a function that writes to the path it is given.
    """
    temporary = path.with_name(f"{WRITING}{os.getpid()}_{path.name}")
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed left of files they were writing into a folder."""
    for path in folder.glob(f"{WRITING}*"):
        path.unlink(missing_ok=True)
