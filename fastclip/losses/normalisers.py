"""The running normalisers of the global contrastive loss: two numbers for each sample, spread over the ranks."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastclip.distributed import gather_rows, sum_over_ranks


class Normalisers(nn.Module):
    """log u and log v of every sample, -inf for one that was never seen. Sample i is kept by rank i % W.

    `log_u` (2, own samples + 1) in fp32 is this rank's part, 8 bytes a sample over all ranks; what is no rank's to keep
    is written to its last column. Logarithms, since at a scale of 100 the numbers themselves leave fp32.

    Args:
        samples: of the data set.
        group: process group, None for this process alone.
    """

    log_u: Tensor

    def __init__(self, samples: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"samples is {samples}, must be at least 1: how many the data set has")
        self.samples, self.group = samples, group
        self.rank, self.world_size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        own = len(range(self.rank, samples, self.world_size))
        self.register_buffer("log_u", torch.full((2, own + 1), -torch.inf))

    def update(self, index: Tensor, now: Tensor, gamma: float, counts: Sequence[int]) -> Tensor:
        """u <- (1 - gamma) u + gamma exp(now), u <- exp(now) the first time; returns the new log u (2, n).

        One gather of the batch's numbers and one small sum over the ranks. What is not finite is returned but not kept;
        of a sample that a batch holds several times the largest is.

        Args:
            index: (n,) int64 in [0, samples).
            now: (2, n), what the batch says.
            counts: how many samples each rank brings.
        """
        now = now.to(self.log_u.dtype)
        if self.group is not None:
            index = gather_rows(index, counts, self.group)
            now = gather_rows(now.T.contiguous(), counts, self.group).T
        is_own, scrap = index % self.world_size == self.rank, self.log_u.shape[1] - 1
        place = torch.where(is_own, index // self.world_size, scrap)
        before = self.log_u[:, place]
        keeps, takes = (math.log(x) if x > 0 else -math.inf for x in (1 - gamma, gamma))
        new = torch.where(before == -torch.inf, now, torch.logaddexp(before + keeps, now + takes))
        place = torch.where(is_own & new.isfinite(), place, scrap)
        self.log_u.scatter_reduce_(1, place, new, "amax", include_self=False)
        if self.group is None:
            return new
        first = sum(counts[: self.rank])
        return sum_over_ranks(torch.where(is_own, new, 0), self.group)[:, first : first + counts[self.rank]]

    def part(self) -> Tensor:
        """(2, own samples), what a checkpoint keeps of this rank."""
        return self.log_u[:, :-1]

    def load_own(self, part: Tensor) -> None:
        """Takes up this rank's `part`."""
        if part.shape != self.part().shape:
            raise ValueError(f"part has shape {tuple(part.shape)}, must have {tuple(self.part().shape)}")
        self.part().copy_(part)

    def load_parts(self, parts: Sequence[Tensor]) -> None:
        """Takes up the `part` of every rank, in rank order, of a run with any number of ranks.

        Raises:
            ValueError: they are of another number of samples.
        """
        held = sum(part.shape[1] for part in parts)
        if held != self.samples:
            raise ValueError(f"parts hold {held} samples, must hold {self.samples}: those of the same data set")
        own = torch.arange(self.rank, self.samples, self.world_size)
        for rank, part in enumerate(parts):
            here = own % len(parts) == rank
            self.part()[:, here.to(self.log_u.device)] = part[:, own[here] // len(parts)].to(self.log_u)
