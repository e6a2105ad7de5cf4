"""Collectives with gradients, over an explicit process group: what a loss over all ranks needs and nothing else."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of x (W * n, ...), this rank's part (n, ...)."""
    n = x.shape[0] // dist.get_world_size(group)
    if dist.get_backend(group) == "gloo":  # has no reduce-scatter on every torch we support
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total[dist.get_rank(group) * n :][:n]
    own = x.new_empty((n, *x.shape[1:]))
    dist.reduce_scatter_tensor(own, x.contiguous(), group=group)
    return own


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_gathered: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(d_gathered, ctx.group), None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None]:
        d_x = d_total.clone()
        dist.all_reduce(d_x, group=ctx.group)
        return d_x, None


class _MergeLogSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, highest: Tensor, log_sum: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        total_max = highest.clone()
        dist.all_reduce(total_max, op=dist.ReduceOp.MAX, group=group)
        partial = highest - total_max.masked_fill(total_max == -torch.inf, 0) + log_sum
        total = partial.exp()
        dist.all_reduce(total, group=group)
        total.log_()
        ctx.save_for_backward(partial, total)
        ctx.group = group
        own_max, own_log_sum = (own_slice(x, group).clone() for x in (total_max, total))
        ctx.mark_non_differentiable(own_max)
        return own_max, own_log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_own_max: Tensor, d_own_log_sum: Tensor) -> tuple[None, Tensor, None]:
        partial, total = ctx.saved_tensors
        share = (partial - total.masked_fill(total == -torch.inf, 0)).exp_()
        return None, share.mul_(_all_gather(d_own_log_sum, ctx.group)), None


def own_slice(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's n rows of x (W * n, ...)."""
    n = x.shape[0] // dist.get_world_size(group)
    return x[dist.get_rank(group) * n :][:n]


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x (n, ...) of every rank in rank order, (W * n, ...). Every rank must bring the same n.

    The gradient is that of the sum of all ranks' results: a reduce-scatter (sum) of the incoming gradients.
    """
    return _AllGather.apply(x, group)


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, on every rank; the gradient is that of the sum of all ranks' results."""
    return _AllReduceSum.apply(x, group)


def merge_log_sum(highest: Tensor, log_sum: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """This rank's slice (n,) of the log-sum-exp over all ranks, in O(N) traffic.

    Each rank brings (highest, log_sum), both (W * n,) with lse = highest + log_sum (-inf: an empty sum), and gets the
    same pair for its slice. `highest` is a constant to autograd; the gradient of log_sum is that of the sum of all
    ranks' results.
    """
    return _MergeLogSum.apply(highest, log_sum, group)


def check_equal_rows(name: str, x: Tensor, group: dist.ProcessGroup) -> None:
    """Raises ValueError on every rank unless all ranks bring as many rows of `name`. One small collective, and a wait
    for it."""
    counts = _all_gather(torch.tensor([x.shape[0]], device=x.device), group).tolist()
    if len(set(counts)) != 1:
        raise ValueError(f"{name} has {counts} rows on the ranks of the group, must have the same number on each")
