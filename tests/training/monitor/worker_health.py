"""Run by torchrun: the spread of a batch of which every process holds a share, gathered by rank 0 into a file.

Usage: worker_health.py EXPECTED_WORLD_SIZE OUTPUT_FILE
"""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from hf_vicreg.training.monitor.health import spread

SHAPES = [(12, 2, 40), (24, 1, 7), (30, 3, 30)]  # N < D: Gram matrix; N >= D: covariance


def rows(shape):
    """Correlated rows with a mean, `(N, views, D)`."""
    generator = torch.Generator().manual_seed(sum(shape))
    mixing = torch.randn(shape[2], shape[2], generator=generator) * torch.linspace(1, 0.1, shape[2])
    return torch.randn(shape, generator=generator) @ mixing / shape[2] ** 0.5 + 0.5


def name(shape):
    return "x".join(map(str, shape))


def main():
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size != int(sys.argv[1]):
        raise SystemExit(f"expected {sys.argv[1]} processes, got {world_size}")
    results = {"world_size": torch.tensor(world_size)}
    for shape in SHAPES:
        found = spread(rows(shape).chunk(world_size)[rank], dist.group.WORLD)
        everyone = [None] * world_size
        dist.all_gather_object(everyone, list(found))
        results[name(shape)] = torch.tensor(everyone, dtype=torch.float64)
    if rank == 0:
        save_file(results, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
