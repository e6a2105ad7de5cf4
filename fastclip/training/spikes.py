"""Finding losses that jump, behind which a run rolls back (Chowdhery et al. 2022, section 5.1)."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW, LEAST = 100, 20  # steps that the median is taken over, and that must have been before one is a spike


class Spikes:
    """A loss is a spike where it is more than `factor` times the median of the last WINDOW losses that were none."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def look(self, loss: float) -> bool:
        """After every step; a loss that is not finite is a matter of skipped steps, not of spikes."""
        if not math.isfinite(loss):
            return False
        if len(self._losses) >= LEAST and loss > self._factor * median(self._losses):
            return True
        self._losses.append(loss)
        return False
