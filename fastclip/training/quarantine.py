"""Steps that were skipped because something in them was not finite, or whose loss was a spike: whose samples they were,
and how many were skipped in a row."""

from __future__ import annotations

import json
import math
from pathlib import Path

from fastclip.errors import UserError
from fastclip.training.processes import Processes

FILE = "quarantine.jsonl"


class Quarantine:
    """The record of a run; every rank makes one and calls it together.

    A line of quarantine.jsonl is {"step", "loss", "grad_norm" (null where not finite), "ranks": those whose own
    features were not finite, else all, "keys": their samples of that step}.
    """

    def __init__(self, run: Path, processes: Processes, most: int) -> None:
        self.path, self.processes, self.most, self.in_a_row = run / FILE, processes, most, 0

    def look(self, is_skipped: bool) -> None:
        """After every step."""
        self.in_a_row = self.in_a_row + 1 if is_skipped else 0

    def record(self, step: int, loss: float, grad_norm: float, keys: list[str], is_finite: bool) -> None:
        """After such a step; is_finite: this rank's own features were."""
        found = self.processes.gather((is_finite, keys))
        if not self.processes.is_first:
            return
        ranks = [rank for rank, (was_finite, _) in enumerate(found) if not was_finite] or list(range(len(found)))
        line = {
            "step": step,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "ranks": ranks,
            "keys": [key for rank in ranks for key in found[rank][1]],
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @property
    def is_full(self) -> bool:
        return self.in_a_row > self.most

    def error(self) -> UserError:
        """What ends the run when it is full."""
        return UserError(
            f"{self.in_a_row} steps in a row had a gradient that is not finite; none of them changed the weights, "
            f"which are saved. {self.path} names their samples. Lower --lr, lengthen --warmup, or raise --max-skipped"
        )
