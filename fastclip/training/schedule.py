"""The learning rate over a run, as a factor of its peak."""

from __future__ import annotations

import math


def lr_factor(schedule: str, step: int, warmup: int, progress: float) -> float:
    """min(1, (step + 1) / warmup) * shape(progress) with shape 1 ("constant") or (1 + cos(pi progress)) / 2 ("cosine").

    step: 0-based optimizer step. progress: share of the run that is done, in [0, 1], by steps or by the clock.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    shape = 1.0 if schedule == "constant" else (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return rise * shape
