"""Collectives over an explicit process group: what a loss over all ranks needs and nothing else.

`all_gather` and `all_reduce_sum` have gradients; the rest are called by losses that make their own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Layout(NamedTuple):
    """Where this rank's images and texts lie among those of the group; without a group there is one rank."""

    group: dist.ProcessGroup | None
    rank: int
    images: tuple[int, ...]  # how many each rank brings
    texts: tuple[int, ...]

    @property
    def first_text(self) -> int:
        return sum(self.texts[: self.rank])


def even_layout(images: int, texts: int, group: dist.ProcessGroup | None) -> Layout:
    """As if every rank brought as many."""
    if group is None:
        return Layout(None, 0, (images,), (texts,))
    world_size = dist.get_world_size(group)
    return Layout(group, dist.get_rank(group), (images,) * world_size, (texts,) * world_size)


def gather_counts(counts: Sequence[int], device: torch.device, group: dist.ProcessGroup) -> list[list[int]]:
    """`counts` of every rank, by rank. One small collective, and a wait for it."""
    own = torch.tensor([counts], device=device)
    return gather_rows(own, (1,) * dist.get_world_size(group), group).tolist()


def gather_rows(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """x (counts[rank], ...) of every rank in rank order, (sum(counts), ...)."""
    longest = max(counts)
    padded = _pad_rows(x, longest).contiguous()
    gathered = x.new_empty((len(counts) * longest, *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, padded, group=group)
    if min(counts) == longest:
        return gathered
    return torch.cat([part[:count] for part, count in zip(gathered.split(longest), counts, strict=True)])


def reduce_scatter_rows(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of x (sum(counts), ...), of which this rank gets its own rows, (counts[rank], ...)."""
    rank, longest = dist.get_rank(group), max(counts)
    if dist.get_backend(group) == "gloo":  # has no reduce-scatter on every torch we support
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total.split(list(counts))[rank]
    if min(counts) != longest:
        x = torch.cat([_pad_rows(part, longest) for part in x.split(list(counts))])
    own = x.new_empty((longest, *x.shape[1:]))
    dist.reduce_scatter_tensor(own, x.contiguous(), group=group)
    return own[: counts[rank]]


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    missing = rows - x.shape[0]
    return torch.cat((x, x.new_zeros((missing, *x.shape[1:])))) if missing else x


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, on every rank, without a gradient."""
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


def merge_log_sum(highest: Tensor, log_sum: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(max, log_sum) over all ranks from (max, log_sum) (M,) of each, with lse = max + log_sum (-inf: an empty sum)."""
    total_max = highest.clone()
    dist.all_reduce(total_max, op=dist.ReduceOp.MAX, group=group)
    share = (highest - total_max.masked_fill(total_max == -torch.inf, 0) + log_sum).exp()
    return total_max, sum_over_ranks(share, group).log_()


class Passing:
    """Tensors on their way round the ring: to the next rank, while those of the previous one arrive.

    What is sent must stay as it is until `wait`, which returns what arrived.
    """

    def __init__(self, tensors: Sequence[Tensor], rows: int, group: dist.ProcessGroup) -> None:
        """Sends each of `tensors` (their rows first), and expects the like with `rows` rows."""
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        after, before = (dist.get_global_rank(group, (rank + step) % world_size) for step in (1, -1))
        self._sent = [x.contiguous() for x in tensors]
        self._arrived = [x.new_empty((rows, *x.shape[1:])) for x in tensors]
        operations = [
            dist.P2POp(operation, x, peer, group)
            for sent, arrived in zip(self._sent, self._arrived, strict=True)
            for operation, x, peer in ((dist.isend, sent, after), (dist.irecv, arrived, before))
        ]
        self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self._arrived


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.counts = group, (x.shape[0],) * dist.get_world_size(group)
        return gather_rows(x, ctx.counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_gathered: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_rows(d_gathered, ctx.counts, ctx.group), None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return sum_over_ranks(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(d_total, ctx.group), None


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x (n, ...) of every rank in rank order, (W * n, ...). Every rank must bring the same n.

    The gradient is that of the sum of all ranks' results: a reduce-scatter (sum) of the incoming gradients.
    """
    return _AllGather.apply(x, group)


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, on every rank; the gradient is that of the sum of all ranks' results."""
    return _AllReduceSum.apply(x, group)


def check_equal_rows(name: str, x: Tensor, group: dist.ProcessGroup) -> None:
    """Raises ValueError on every rank unless all ranks bring as many rows of `name`. One small collective, and a wait
    for it."""
    counts = [count for (count,) in gather_counts((x.shape[0],), x.device, group)]
    if len(set(counts)) != 1:
        raise ValueError(f"{name} has {counts} rows on the ranks of the group, must have the same number on each")
