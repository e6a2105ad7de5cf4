"""The settings under which a run fits its memory: smaller chunks, then recomputation, then more partitioning."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch

from fastclip.errors import UserError
from fastclip.training.config import PER_TENSOR, Recompute, TrainConfig
from fastclip.training.plan import Memory, memory
from fastclip.training.processes import Processes

GB = 1e9
SHARE = 0.85  # of the memory that a run may take by the plan, which was off by 13 % at worst
THIN = 64  # pairs: products of smaller chunks are slow, so that recomputing costs less
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)


def cheapest(
    config: TrainConfig,
    world_size: int,
    capacity: float,
    stages: Sequence[int],
    recomputes: Sequence[Recompute] = RECOMPUTES,
    text_tokens: float | None = None,
) -> tuple[TrainConfig, Memory]:
    """The config that fits, and what it takes: the first stage that does, the first of `recomputes`, the largest chunk.

    capacity: bytes of a rank. config: its chunk_size is the largest that is tried, 0 for all that a rank has.
    """
    local = config.global_batch // world_size
    largest = min(config.chunk_size or local, local)
    least, last = float("inf"), config
    for stage in stages:
        for recompute in recomputes:
            for chunk in _halves(largest):
                if chunk < min(THIN, largest) and recompute != recomputes[-1]:
                    break
                last = replace(config, zero_stage=stage, recompute=recompute, chunk_size=chunk)
                need = memory(last, world_size, text_tokens)
                if need.total <= SHARE * capacity:
                    return last, need
                least = min(least, need.total)
    raise UserError(
        f"nothing fits in {SHARE:.0%} of {capacity / GB:.3g} GB: the least is {least / GB:.3g} GB, at ZeRO-"
        f"{last.zero_stage}, recompute {last.recompute} and chunks of {last.chunk_size}; use more GPUs, a smaller "
        "batch or offload"
    )


def fit(config: TrainConfig, processes: Processes) -> tuple[TrainConfig, str]:
    """A run's config that fits what is free on every rank's device, and a line about it: its own chunk size, recompute
    and stage where they do, else ones that take less. Called on every rank; raises UserError on every rank."""
    capacity = min(processes.gather(_free_bytes(processes.device)))
    mistake, chosen = None, None
    if processes.is_first:
        is_fixed = config.engine == "torch" or config.deepspeed_config or config.optimizer in (*PER_TENSOR, "muon")
        stages = (config.zero_stage,) if is_fixed else range(config.zero_stage, 4)
        recomputes = RECOMPUTES[RECOMPUTES.index(config.recompute) :]
        try:
            chosen = cheapest(config, processes.world_size, capacity, stages, recomputes)
        except UserError as error:
            mistake = error
    processes.raise_together(mistake)
    fitting, need = processes.gather(chosen)[0]
    line = (
        f"fits: {need.total / GB:.3g} GB a rank by the plan, {capacity / GB:.3g} GB free, at "
        f"ZeRO-{fitting.zero_stage}, recompute {fitting.recompute}, chunk_size {fitting.chunk_size}"
    )
    return replace(fitting, fit=False), line


def _free_bytes(device: torch.device) -> float:
    """Of a GPU, or this rank's part of what the machine has available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _halves(size: int) -> list[int]:
    """size, size / 2, ... down to 1, rounded up."""
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes
