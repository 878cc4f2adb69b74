"""Batches of the images of shards, of this process's lanes, as one loader process or several make them."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.decoding import UnusableImage
from hf_vicreg.training.images.files.shard_stream import Lane, ShardStream
from hf_vicreg.training.images.order import MAX_SUBSTITUTES, alike, collate, draw_views, joint_reduction
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.launch.signals import end_workers, outlive_signals

logger = logging.getLogger(__name__)


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
                image = self.stream.decoded(encoded, partial(joint_reduction, self.samplers, key))
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
        num_processes: Processes that share the lanes; see `ShardStream.refuse_processes`.
        pin_memory: As the loader's.

    Raises:
        InputError: Credentials are gone, or missing for some of the shards.
    """
    num_lanes = stream.num_lanes(batch_size)
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
    return {name: _together(alike([part[name] for part in parts])) for name in names} | joined


def _together(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return tensors as one, in memory that a GPU reads without waiting where theirs is."""
    if not parts[0].is_pinned():
        return torch.cat(parts)
    size = (sum(len(one) for one in parts), *parts[0].shape[1:])
    return torch.cat(parts, out=torch.empty(size, dtype=parts[0].dtype, pin_memory=True))
