"""Sums and samples of the batch of all processes, with the gradient of one process that holds it all.

Every process computes the whole loss, and gradients are averaged over the processes afterwards: what these functions
give backwards is therefore multiplied by the number of processes, so that the mean is the gradient of the joined
batch.
Without a process group they return what they are given.
"""

from typing import Any

import torch
import torch.distributed as dist


def global_sum(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the sum of a tensor over the processes, the same on each; every one must call.

    Args:
        values: This process's share of the sum.
        group: The processes. What is made of the sum has to be the same on all of them.
    """
    return values if group is None else _Sum.apply(values, group)


def global_samples(rows: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the rows `(N, ...)` of all processes in the order of their ranks; every one must call.

    Args:
        rows: `(n, ...)`, this process's, as many as every other's.
        group: The processes. What each makes of the rows may differ: shares of one `global_sum`.
    """
    return rows if group is None else _Gather.apply(rows, group)


def global_size(rows: torch.Tensor, group: dist.ProcessGroup | None) -> int:
    """Return how many samples all processes hold, where each holds as many as this one."""
    return len(rows) * (1 if group is None else dist.get_world_size(group))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.world_size = dist.get_world_size(group)
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.world_size, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.length = group, len(rows)
        everyone = rows.new_empty(len(rows) * dist.get_world_size(group), *rows.shape[1:])
        dist.all_gather(list(everyone.chunk(dist.get_world_size(group))), rows.contiguous(), group=group)
        return everyone

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.length
        return total[start : start + ctx.length], None


__all__ = ["global_samples", "global_size", "global_sum"]
