"""Batch normalisation over the batch of all processes, on any device.

`torch.nn.SyncBatchNorm` refuses to run on CPUs once a process group exists. VICReg's expander normalises over the
batch, and statistics of one process's share would make the loss depend on how many processes there are.
"""

import torch
import torch.distributed as dist
from torch import nn


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` whose training statistics are those of the global batch when a process group is given.

    Without a group, and in evaluation, it is `nn.BatchNorm1d`.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float

    def forward(self, hidden_states: torch.Tensor, process_group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Return `(batch, features)` normalised.

        Args:
            hidden_states: `(batch, features)`, this process's share of the batch.
            process_group: Processes that together hold the batch; each must call.

        Raises:
            ValueError: Fewer than two samples in training; of several processes, a share without any.
        """
        if process_group is None or not self.training:
            return super().forward(hidden_states)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            normalised, mean, variance, count = _Normalise.apply(hidden_states.to(dtype), self.eps, process_group)
            self._update_running(mean, variance, count)
            return (normalised * self.weight + self.bias).to(hidden_states.dtype)

    @torch.no_grad()
    def _update_running(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)


def standardised(rows: torch.Tensor, eps: float, process_group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return rows `(batch, features)` with mean 0 and (biased) variance 1 over the global batch."""
    if process_group is None:
        return torch.nn.functional.batch_norm(rows, None, None, training=True, eps=eps)
    return _Normalise.apply(rows, eps, process_group)[0]


class _Normalise(torch.autograd.Function):
    """`(x - mean) / sqrt(var + eps)` with mean and (biased) variance of the global batch."""

    @staticmethod
    def forward(ctx, x, eps, group):
        # each process sends (n, mean, sum of squared deviations); merged as in Chan et al. 1979, free of cancellation
        if len(x) < (2 if dist.get_world_size(group) == 1 else 1):
            # of the process's own alone: the count of all is on the device, and reading it would wait for that
            raise ValueError(f"`hidden_states`: expected at least 2 samples in training, got {len(x)}.")
        mean = x.mean(0)
        local = torch.cat([x.new_full((1,), len(x)), mean, (x - mean).square().sum(0)])
        shares = local.new_empty(dist.get_world_size(group), len(local))
        dist.all_gather(list(shares.unbind()), local, group=group)
        counts, (means, squares) = shares[:, :1], shares[:, 1:].chunk(2, dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        variance = (squares + counts * (means - mean).square()).sum(0) / count
        inverse = (variance + eps).rsqrt()
        normalised = (x - mean) * inverse
        ctx.save_for_backward(normalised, inverse, count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance, count)
        return normalised, mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, *_):
        normalised, inverse, count = ctx.saved_tensors
        sums = torch.stack([gradient.sum(0), (gradient * normalised).sum(0)])
        dist.all_reduce(sums, group=ctx.group)
        mean_gradient, mean_projection = sums / count
        return (gradient - mean_gradient - normalised * mean_projection) * inverse, None, None


__all__ = ["GlobalBatchNorm1d", "standardised"]
