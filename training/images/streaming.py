"""Images that are read as they come, too many to store: `--streaming`.

A stream has no length and no index. So what an `ImageSource` promises is given up in part, and said in the log: each
pass mixes images through a buffer instead of a permutation; order and views depend on the number of processes and
workers; and a resumed run begins a new pass in another order, in which some images come again before others have come
at all.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import fsspec
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.channels.channel_source import raster_of
from hf_vicreg.training.images.decoding import KINDS, UnusableImage, decode
from hf_vicreg.training.images.image_source import NUM_SAMPLED, ImageSource
from hf_vicreg.training.images.order import MAX_SUBSTITUTES, collate, draw_views, joint_reduction
from hf_vicreg.training.images.sources import image_column_of, load_splits
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.launch.signals import end_workers, outlive_signals

logger = logging.getLogger(__name__)

NUM_FINGERPRINTED = 8
SAMPLED_SHARDS, SAMPLED_BYTES = 8, 2**29  # of what is looked at before a run
DIGEST_BITS = 48  # of the number that an unusable image is known by; above them the kind of reason
BUFFER_SIZE = 1000  # images, still encoded, that the next one is drawn from


@dataclass(frozen=True)
class ImageStream:
    """Encoded images in passes over a dataset's shards.

    Attributes:
        name: What the images are called in logs and cards.
        rows: `datasets.IterableDataset` of undecoded images.
        column: The column they are in.
        min_size: Smallest usable image, (height, width) in pixels.
        num_channels: Of every image, read in its own depth; None reads 8-bit RGB.
        pages: What pages of a file are, as of `ChannelSource`; of several images the first is taken.
    """

    name: str
    rows: Any
    column: str
    min_size: tuple[int, int] = (1, 1)
    num_channels: int | None = None
    pages: str | None = None

    @property
    def num_shards(self) -> int:
        """How many files the images lie in: the most processes and workers that can read at once."""
        return self.rows.num_shards

    @property
    def fingerprint(self) -> str:
        """Of what can be known without reading everything: shards, columns and the first images."""
        digest = hashlib.sha256(f"{self.num_shards} {self.column}".encode())
        for row in self.rows.take(NUM_FINGERPRINTED):
            entry = row[self.column] or {}
            digest.update(entry.get("bytes") or str(os.path.basename(entry.get("path") or "")).encode())
        return f"stream {digest.hexdigest()[:16]}{self._channels}"

    @property
    def _channels(self) -> str:
        """What the fingerprint says of how images are read; nothing of RGB."""
        return "" if self.num_channels is None else f" {self.num_channels} {self.pages}"

    def at_least(self, height: int, width: int) -> "ImageStream":
        """Return the same images, smaller ones being unusable from now on."""
        return replace(self, min_size=(height, width))

    def with_channels(self, num_channels: int | None, pages: str | None) -> "ImageStream":
        """Return the same images, read with so many channels from now on."""
        return replace(self, num_channels=num_channels, pages=pages)

    def decoded(self, encoded: bytes, reduction: Callable[[int, int], int] | None = None) -> Any:
        """Return an image as it is read, RGB of Pillow's or a `Raster`; arguments and errors as of `decode`."""
        if self.num_channels is None:
            return decode(encoded, self.min_size, reduction)
        return raster_of(encoded, self.num_channels, self.pages, self.min_size)

    def sample(self) -> ImageSource:
        """Return up to 64 images in memory, the first ones of up to 8 shards that are spread evenly over all.

        Raises:
            InputError: There is none, or a shard cannot be read.
        """
        shards = range(0, self.num_shards, -(-self.num_shards // SAMPLED_SHARDS) or 1)
        found: list[bytes] = []
        for shard in shards:
            room = SAMPLED_BYTES // len(shards)
            for encoded in self._first_of(shard, -(-NUM_SAMPLED // len(shards))):
                room -= len(encoded)
                if room < 0 and found:
                    break
                found.append(encoded)
        if not found:
            raise InputError(f"`dataset_name`: expected images in {self.name}, found none in its first shards.")
        return ImageSource(self.name, len(found), found.__getitem__, self.fingerprint)

    def _first_of(self, shard: int, count: int) -> Iterator[bytes]:
        """Yield the first encoded images of a shard."""
        try:
            for row in self.rows.shard(num_shards=self.num_shards, index=shard).take(count):
                yield _bytes_of(row[self.column])
        except (OSError, ValueError, RuntimeError) as error:
            raise _unreadable(self.name, error) from error

    def describe(self, index: int) -> str:
        """Return what an unusable image, known by its contents alone, is called."""
        return f"the image whose SHA-256 begins with {index % 2**DIGEST_BITS:012x}"

    def refusal(self, index: int) -> UnusableImage | None:
        """Return why it could not be used, by its kind alone; None where the number does not hold it."""
        place = index >> DIGEST_BITS
        return UnusableImage(list(KINDS)[place - 1]) if 0 < place <= len(KINDS) else None


def load_stream(
    dataset_name: str,
    dataset_config_name: str | None = None,
    train_split: str = "train",
    image_column_name: str | None = None,
) -> ImageStream:
    """Return a stream over a Hub dataset or a local folder of parquet shards.

    Raises:
        InputError: Nothing to read there, an unknown split, no or several image columns.
    """
    import datasets

    splits = load_splits(dataset_name, dataset_config_name, streaming=True)
    if train_split not in splits:
        raise InputError(f"`train_split`: expected one of {sorted(splits)} in {dataset_name}, got {train_split!r}.")
    rows = splits[train_split]
    if rows.features is None:
        raise InputError(f"`streaming`: expected data whose columns are known, as parquet's are, in {dataset_name}.")
    column = image_column_of(dataset_name, rows.features, image_column_name)
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    name = os.path.basename(os.path.abspath(dataset_name)) if os.path.isdir(dataset_name) else dataset_name
    stream = ImageStream(name, rows, column)
    logger.info("streaming %s: %d shards, mixed through %d images", name, stream.num_shards, BUFFER_SIZE)
    return stream


class StreamDataset(IterableDataset):
    """Endless samples, as `ViewDataset` gives them, of this process's and worker's part of a stream."""

    def __init__(
        self, stream: ImageStream, samplers: list[ViewSampler], key: str, process_index: int, num_processes: int
    ):
        """Take what is drawn from: `key` seeds the passes' orders and the views."""
        self.stream, self.samplers, self.key = stream, samplers, key
        self.share = {"rank": process_index, "world_size": num_processes}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        part = f"{self.share['rank']}/{worker.id if worker is not None else 0}"
        unusable: list[int] = []
        drawn, epoch = 1, 0
        while drawn:  # a worker beyond the number of shards gets nothing and stops
            drawn = 0
            for encoded in self._pass(epoch):
                drawn += 1
                key = f"{self.key}/{epoch}/{part}/{drawn}"
                try:
                    reduction = partial(joint_reduction, self.samplers, key)
                    image = self.stream.decoded(encoded, reduction)
                except UnusableImage as error:
                    # a stream has no index to read it by again: its contents, and above them why
                    place = list(KINDS).index(error.kind) + 1
                    unusable.append(place << DIGEST_BITS | int.from_bytes(hashlib.sha256(encoded).digest()[:6]))
                    if len(unusable) < MAX_SUBSTITUTES:
                        continue
                    yield {"views": None, "colours": None, "unusable": unusable}
                else:
                    yield draw_views(self.samplers, image, key) | {"unusable": unusable}
                unusable = []
            epoch += 1

    def _pass(self, epoch: int) -> Iterator[bytes]:
        """Yield the encoded images of one pass, b"" for those that are missing."""
        from datasets.distributed import split_dataset_by_node

        # one number for all: processes split the same order of shards
        seed = int.from_bytes(hashlib.sha256(f"{self.key}/{epoch}".encode()).digest()[:4])
        # from one shard at a time: a worker that opens ten of them first may starve the device
        mixed = self.stream.rows.shuffle(seed=seed, buffer_size=BUFFER_SIZE, max_buffer_input_shards=1)
        for row in split_dataset_by_node(mixed, **self.share):
            yield _bytes_of(row[self.stream.column])


def _bytes_of(entry: dict[str, Any] | None) -> bytes:
    """Return a row's encoded image, b"" if it is missing."""
    entry = entry or {"bytes": b""}
    if entry["bytes"] is not None:
        return entry["bytes"]
    try:
        with fsspec.open(entry["path"], "rb") as file:
            return file.read()
    except Exception:  # of whatever the path stands for; a file that is lost is one image less
        return b""


def _unreadable(name: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[-1]
    return InputError(f"`dataset_name`: expected shards that can be read in {name}: {reason}")


def stream_batches(
    stream: ImageStream,
    samplers: list[ViewSampler],
    *,
    seed: int,
    first_step: int,
    num_batches: int,
    batch_size: int,
    num_workers: int,
    process_index: int,
    num_processes: int,
    pin_memory: bool,
) -> Iterator[dict[str, Any]]:
    """Yield this process's batches, as `collate` makes them.

    Args:
        stream: Where images come from.
        samplers: One for each view.
        seed: The run's; with `first_step` it makes the order and the views.
        first_step: Where the run resumes.
        num_batches: How many are asked for.
        batch_size: This process's images in a batch.
        num_workers: Loader processes; no more than there are shards for.
        process_index: This process's rank.
        num_processes: Processes that share the stream.
        pin_memory: As the loader's.

    Raises:
        InputError: The stream holds no images, or a shard that cannot be read.
    """
    if first_step:
        logger.warning("streaming: the run goes on in a new order; some images come again before others come at all")
    loader = DataLoader(
        StreamDataset(stream, samplers, f"{seed}/{first_step}", process_index, num_processes),
        batch_size=batch_size,
        num_workers=min(num_workers, max(1, stream.num_shards // num_processes)),
        collate_fn=collate,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=outlive_signals,
        pin_memory=pin_memory,
    )
    batches = iter(loader)
    try:
        for _ in range(num_batches):
            try:
                batch = next(batches, None)
            except (OSError, ValueError, RuntimeError) as error:  # of a loader process, wrapped into its own kind
                unreadable = _unreadable(stream.name, error)
                logger.error("process %d: %s", process_index, unreadable)  # the others do not see this one's shards
                raise unreadable from error
            if batch is None:
                message = f"`dataset_name`: expected images in {stream.name}, process {process_index} got none."
                logger.error(message)
                raise InputError(message)
            yield batch
    finally:
        end_workers(batches)
