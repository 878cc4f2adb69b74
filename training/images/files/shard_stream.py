"""Images from shards, read as they come, in an order that a checkpoint can go on in to the image.

Shards are dealt out, in a keyed order anew each epoch, to a fixed number of lanes. A lane reads its shards one after
the other, some images ahead, and gives those in a keyed order. A batch takes as many images from each lane, processes
and their loader processes take lanes. So neither order nor views depend on how many of them there are; and where a
lane stands is five numbers, which each batch carries with it and a checkpoint stores.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.decoding import KINDS, UnusableImage, decode
from hf_vicreg.training.images.files.shards import Member, ShardLost, list_shards, members, short_name
from hf_vicreg.training.images.order import (
    MAX_SUBSTITUTES,
    collate,
    draw_views,
    joint_reduction,
    keyed_permutation,
)
from hf_vicreg.training.images.streaming import BUFFER_SIZE, ImageStream
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.launch.signals import end_workers, outlive_signals

logger = logging.getLogger(__name__)

MOST_LANES = 128
MOST_EMPTY = 16  # shards in a row without an image, before a lane gives up
TRIED_FIRST = 8  # shards that are opened before a run begins, until one holds an image
# of the number that an unusable image is known by: which of the shard's images, from 1 on; 0 is the rest of the shard
PLACE_BITS, SHARD_BITS = 32, 32


@dataclass(frozen=True)
class ShardStream(ImageStream):
    """Encoded images in shards; `rows` are the names of these."""

    rows: Sequence[str]

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Of the list of shards: one that is longer, or in another order, is dealt out in another way."""
        names = "\n".join(short_name(self.rows, index) for index in range(len(self.rows)))
        return f"shards {hashlib.sha256(names.encode()).hexdigest()[:16]}"

    def describe(self, index: int) -> str:
        """Return the shard of an unusable image, and which of its images it is."""
        place, shard = index % 2**PLACE_BITS, (index >> PLACE_BITS) % 2**SHARD_BITS
        return short_name(self.rows, shard) + (f", image {place}" if place else ", from some byte on")

    def refusal(self, index: int) -> UnusableImage:
        """Return why it could not be used, by its kind alone."""
        return UnusableImage(list(KINDS)[index >> PLACE_BITS + SHARD_BITS])

    def number_of(self, kind: str, shard: int, place: int) -> int:
        """Return the number by which an unusable image is known."""
        return (list(KINDS).index(kind) << SHARD_BITS | shard) << PLACE_BITS | place

    def num_lanes(self, batch_size: int) -> int:
        """Return the number of lanes: of the batch's divisors, no more than shards, the one that most numbers divide.

        Each of these numbers of processes can share the lanes; how many there are has no part in it.
        """
        possible = [one for one in range(1, min(MOST_LANES, self.num_shards) + 1) if batch_size % one == 0]
        return max(possible, key=lambda lanes: (sum(lanes % one == 0 for one in possible), lanes))


def load_shards(pattern: str) -> ShardStream:
    """Return a stream over the shards that a pattern names.

    Raises:
        InputError: None, none with an image among the first of them, or missing credentials.
    """
    shards = list_shards(pattern)
    stream = ShardStream(pattern.rsplit("/", 1)[-1], shards, "")
    reason = "no image in them"
    for index in range(min(TRIED_FIRST, len(shards))):
        try:
            next(members(shards[index]))
        except StopIteration:
            continue
        except ShardLost as error:
            reason = f"{short_name(shards, index)}: {KINDS[error.kind]} ({error})"
            continue
        logger.info("%s: %d shards, mixed through %d images", stream.name, len(shards), BUFFER_SIZE)
        return stream
    raise InputError(f"`dataset_name`: expected shards with images by {pattern!r}, found none: {reason}.")


@dataclass
class Lane:
    """One of the ways through the shards; between two images it stands where its numbers say.

    Attributes:
        stream: The shards.
        key: Another one, another order.
        turn: Which shard of all epochs' shards, one epoch after the other; a lane takes every `num_lanes`-th.
        offset: Byte of the shard at which the images begin that are read ahead.
        first: How many of the shard's images lie before these.
        length: How many these are; 0 where nobody knows yet.
        given: How many of them were given.
        ahead: How many are read ahead.
        num_lanes: Of the run.
        lost: Shards that were given up since this was last asked.
    """

    stream: ShardStream
    key: str
    num_lanes: int
    turn: int
    offset: int = 0
    first: int = 0
    length: int = 0
    given: int = 0
    lost: list[int] = field(default_factory=list)

    @classmethod
    def at(cls, cursor: Sequence[int], stream: ShardStream, key: str, num_lanes: int) -> "Lane":
        """Return a lane that stands where a cursor, or the beginning of one, says."""
        turn, offset, first, length, given = [*cursor, 0, 0, 0, 0][:5]
        return cls(stream, key, num_lanes, turn, offset, first, length, given)

    @property
    def cursor(self) -> list[int]:
        """Where it stands."""
        return [self.turn, self.offset, self.first, self.length, self.given]

    def images(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield epoch, shard, place in the shard from 0 on, and the encoded image, until too many shards hold none."""
        ahead, empty = -(-BUFFER_SIZE // self.num_lanes), 0
        while empty < MOST_EMPTY:
            epoch, place = divmod(self.turn, self.stream.num_shards)
            shard = self._permuted(f"{epoch}/shards", self.stream.num_shards)[place]
            empty += 1
            for block in self._blocks(shard, ahead):
                order = self._permuted(f"{self.turn}/{self.first}", len(block))
                self.offset, self.length = block[0].offset, len(block)
                for chosen in order[self.given :]:
                    self.given += 1
                    empty = 0
                    yield epoch, shard, self.first + chosen, block[chosen].content
                self.first, self.length, self.given = self.first + len(block), 0, 0
            self.turn, self.offset, self.first, self.length, self.given = self.turn + self.num_lanes, 0, 0, 0, 0

    def _permuted(self, key: str, length: int) -> list[int]:
        return keyed_permutation(f"{self.key}/{key}", length, np.arange(length)).tolist()

    def _blocks(self, shard: int, ahead: int) -> Iterator[list[Member]]:
        """Yield the images that are read ahead together; the first are as many as they were before a checkpoint."""
        found: list[Member] = []
        reading = members(self.stream.rows[shard], self.offset)
        while True:
            wanted = self.length or ahead
            try:
                found = []
                for member in islice(reading, wanted):
                    found.append(member)
            except ShardLost as error:
                name = short_name(self.stream.rows, shard)
                logger.warning("shard %s is given up: %s (%s)", name, KINDS[error.kind], error)
                self.lost.append(self.stream.number_of(error.kind, shard, 0))
                reading = iter(())
            if not found:
                return
            yield found


class ShardDataset(IterableDataset):
    """Endless batches of this process's lanes, or of one loader process's part of them."""

    def __init__(
        self,
        stream: ShardStream,
        samplers: list[ViewSampler],
        seed: int,
        lanes: Sequence[int],
        num_lanes: int,
        images_per_lane: int,
        cursors: dict[int, list[int]],
    ):
        """Take what is drawn from, and where each lane stands; one that is not named is at its beginning."""
        self.stream, self.samplers, self.seed, self.lanes = stream, samplers, seed, list(lanes)
        self.num_lanes, self.images_per_lane, self.cursors = num_lanes, images_per_lane, cursors

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, own = get_worker_info(), self.lanes
        if worker is not None:
            own = own[len(own) * worker.id // worker.num_workers : len(own) * (worker.id + 1) // worker.num_workers]
        lanes = [Lane.at(self.cursors.get(one, [one]), self.stream, str(self.seed), self.num_lanes) for one in own]
        samples = [self._samples(lane) for lane in lanes]
        while True:
            found = [sample for one in samples for sample in islice(one, self.images_per_lane)]
            cursors = {number: lane.cursor for number, lane in zip(own, lanes, strict=True)}
            yield collate(found) | {"cursors": cursors}

    def _samples(self, lane: Lane) -> Iterator[dict[str, Any]]:
        """Yield samples as `ViewDataset` gives them; one that cannot be used is replaced by the lane's next."""
        unusable: list[int] = []
        for epoch, shard, place, encoded in lane.images():
            key = f"{self.seed}/{epoch}/{shard}/{place}"
            unusable += lane.lost
            lane.lost.clear()
            try:
                image = decode(encoded, self.stream.min_size, partial(joint_reduction, self.samplers, key))
            except UnusableImage as error:
                unusable.append(self.stream.number_of(error.kind, shard, place + 1))
                if len(unusable) < MAX_SUBSTITUTES:
                    continue
                yield {"views": None, "colours": None, "unusable": unusable}
            else:
                yield draw_views(self.samplers, image, key) | {"unusable": unusable}
            unusable = []
        while True:  # no image in many shards: the run ends by it
            yield {"views": None, "colours": None, "unusable": unusable + lane.lost or [0]}


def shard_batches(
    stream: ShardStream,
    samplers: list[ViewSampler],
    *,
    seed: int,
    cursors: dict[int, list[int]],
    num_batches: int,
    batch_size: int,
    num_workers: int,
    process_index: int,
    num_processes: int,
    pin_memory: bool,
) -> Iterator[dict[str, Any]]:
    """Yield this process's batches, as `collate` makes them, with `cursors`: where its lanes stand behind each.

    Args:
        stream: Where images come from.
        samplers: One for each view.
        seed: The run's.
        cursors: Where lanes stand, by their number; none at the beginning of a run.
        num_batches: How many are asked for.
        batch_size: Images in a batch of all processes.
        num_workers: Loader processes; no more than there are lanes for.
        process_index: This process's rank.
        num_processes: Processes that share the lanes.
        pin_memory: As the loader's.

    Raises:
        InputError: Lanes that the processes cannot share, or credentials that are gone.
    """
    num_lanes = stream.num_lanes(batch_size)
    if num_lanes % num_processes:
        raise InputError(
            f"`dataset_name`: expected the {num_lanes} lanes that {stream.num_shards} shards and a batch of "
            f"{batch_size} give to be shared by {num_processes} processes; take a divisor of {num_lanes} processes."
        )
    own = range(num_lanes * process_index // num_processes, num_lanes * (process_index + 1) // num_processes)
    num_workers = min(num_workers, len(own))
    loader = DataLoader(
        ShardDataset(stream, samplers, seed, own, num_lanes, batch_size // num_lanes, cursors),
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=outlive_signals,
        pin_memory=pin_memory,
    )
    parts = iter(loader)
    try:
        for _ in range(num_batches):
            try:
                # the loader asks its processes in turn: the parts of a batch come in the order of the lanes
                batch = _joined(list(islice(parts, max(1, num_workers))))
            except InputError as error:
                message = str(error).strip().splitlines()[-1].rpartition("InputError: ")[2]
                logger.error("process %d: %s", process_index, message)  # the others do not see this one's shards
                raise InputError(message) from error
            yield batch
    finally:
        end_workers(parts)


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return parts of a batch as one."""
    if len(parts) == 1:
        return parts[0]
    cursors = {number: cursor for part in parts for number, cursor in part["cursors"].items()}
    joined = {"unusable": [index for part in parts for index in part["unusable"]], "cursors": cursors}
    if any(part["views"] is None for part in parts):
        return {"views": None, "colours": None} | joined
    names = [name for name, one in parts[0].items() if isinstance(one, torch.Tensor)]
    return {name: torch.cat([part[name] for part in parts]) for name in names} | joined
