"""The learning rate over a run, as a factor of its peak."""

from __future__ import annotations

import math


def lr_factor(schedule: str, step: int, warmup: int, progress: float, cooldown: float = 0.2, steps: int = 0) -> float:
    """min(1, (step + 1) / warmup) * shape(progress), with progress p in [0, 1] and the cooldown's share c of the run

        constant    1
        cosine      (1 + cos(pi p)) / 2
        open_clip   (1 + cos(pi (step - warmup) / (steps - warmup))) / 2 behind the warm-up
        wsd         1 until p = 1 - c, then 1 - sqrt((p - 1 + c) / c) (Haegele et al. 2024, arXiv 2405.18392)

    step: 0-based optimizer step. progress: share of the run that is done, by steps or by the clock.
    """
    rise, done = min(1.0, (step + 1) / warmup) if warmup else 1.0, min(1.0, progress)
    if schedule == "constant":
        return rise
    if schedule == "open_clip":
        done = max(0.0, (step - warmup) / max(1, steps - warmup))
    if schedule in ("cosine", "open_clip"):
        return rise * (1 + math.cos(math.pi * done)) / 2
    return rise * (1 - math.sqrt(max(0.0, done - 1 + cooldown) / cooldown))
