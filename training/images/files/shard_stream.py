"""Images from shards, read as they come, in an order that a checkpoint can go on in to the image.

Shards are dealt out, in a keyed order anew each epoch, to a fixed number of lanes. A lane reads its shards one after
the other, some images ahead, and gives those in a keyed order. A batch takes as many images from each lane, processes
and their loader processes take lanes. So neither order nor views depend on how many of them there are; and where a
lane stands is five numbers, which each batch carries with it and a checkpoint stores.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.decoding import KINDS, UnusableImage
from hf_vicreg.training.images.files.shards import Member, ShardLost, list_shards, members, short_name
from hf_vicreg.training.images.order import keyed_permutation
from hf_vicreg.training.images.streaming import BUFFER_SIZE, ImageStream
from hf_vicreg.training.run.places import IMAGE_SUFFIXES, SCIENCE_SUFFIXES

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
        return f"shards {hashlib.sha256(names.encode()).hexdigest()[:16]}{self._channels}"

    def members_of(self, shard: int, start: int = 0) -> Iterator[Member]:
        """Yield the images of a shard from one of them on, read by channels those of science too; as `members`."""
        suffixes = IMAGE_SUFFIXES if self.num_channels is None else IMAGE_SUFFIXES | SCIENCE_SUFFIXES
        return members(self.rows[shard], start, self.column, suffixes)

    def _first_of(self, shard: int, count: int) -> Iterator[bytes]:
        """Yield the first encoded images of a shard, fewer if it breaks off."""
        with suppress(ShardLost):
            yield from (one.content for one in islice(self.members_of(shard), count))

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

    def refuse_processes(self, batch_size: int, num_processes: int) -> None:
        """Raise InputError where so many processes cannot share the lanes evenly."""
        lanes = self.num_lanes(batch_size)
        if lanes % num_processes:
            raise InputError(
                f"`dataset_name`: expected the {lanes} lanes that {self.num_shards} shards and a batch of "
                f"{batch_size} give to be shared by {num_processes} processes; take a number of them that divides "
                f"{lanes}."
            )


def load_shards(
    pattern: str, column: str = "", num_channels: int | None = None, pages: str | None = None
) -> ShardStream:
    """Return a stream over the shards that a pattern names.

    Args:
        pattern: As of `list_shards`.
        column: Of images in tables, as of `parquet_members`.
        num_channels: As of `ImageStream`.
        pages: The same.

    Raises:
        InputError: None, none with an image among the first of them, or missing credentials.
    """
    shards = list_shards(pattern)
    stream = ShardStream(pattern.rsplit("/", 1)[-1], shards, column, num_channels=num_channels, pages=pages)
    reason = "no image in them"
    for index in range(min(TRIED_FIRST, len(shards))):
        try:
            next(stream.members_of(index))
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
        offset: Where in the shard the images begin that are read ahead, as of `Member`.
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
            shard = self._permuted(f"{epoch}/shards", self.stream.num_shards, place, place + 1)[0]
            empty += 1
            for block in self._blocks(shard, ahead):
                self.offset, self.length = block[0].offset, len(block)
                for chosen in self._permuted(f"{self.turn}/{self.first}", len(block), self.given, len(block)):
                    self.given += 1
                    empty = 0
                    yield epoch, shard, self.first + chosen, block[chosen].content
                self.first, self.length, self.given = self.first + len(block), 0, 0
            self.turn, self.offset, self.first, self.length, self.given = self.turn + self.num_lanes, 0, 0, 0, 0

    def _permuted(self, key: str, length: int, start: int, stop: int) -> list[int]:
        return keyed_permutation(f"{self.key}/{key}", length, np.arange(start, stop)).tolist()

    def _blocks(self, shard: int, ahead: int) -> Iterator[list[Member]]:
        """Yield the images that are read ahead together; the first are as many as they were before a checkpoint."""
        found: list[Member] = []
        reading = self.stream.members_of(shard, self.offset)
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
