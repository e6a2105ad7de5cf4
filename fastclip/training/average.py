"""A moving average of the weights, which often classifies better than the last weights and costs training nothing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastclip.training.engine import Engine
from fastclip.training.processes import Processes


class WeightAverage:
    """a <- d^k a + (1 - d^k) w every k steps, beginning with the first w (Polyak and Juditsky 1992).

    Kept in host memory by the first rank, in fp32; the others help to gather w and have no `weights`.

    Args:
        decay: d, of one step.
        every: k.
        weights: to go on from.
    """

    def __init__(
        self,
        decay: float,
        every: int,
        engine: Engine,
        processes: Processes,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._decay, self._every = decay**every, every
        self._engine, self._is_first = engine, processes.is_first
        self.restart(weights)

    def restart(self, weights: Mapping[str, Tensor] | None) -> None:
        """Goes on from `weights`."""
        self.weights = dict(weights) if weights and self._is_first else None

    def look(self, step: int) -> None:
        """Takes in the weights behind `step`, where it is one of every k; called on every rank."""
        if step % self._every:
            return
        now = self._engine.full_state_dict()
        if not self._is_first:
            return
        if self.weights is None:
            self.weights = {name: value.clone() for name, value in now.items()}
            return
        for name, value in now.items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - self._decay)
            else:  # the counter of a batch norm
                self.weights[name].copy_(value)
