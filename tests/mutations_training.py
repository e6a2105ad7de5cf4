"""Drops or doubles one chunk, one rank or the scale's gradient of a step, and sees the weights leave the truth.

    python tests/mutations_training.py

Every chunk, every rank, every ZeRO stage, on two ranks; the bound is that of test_training_exact.py. Exit 1 if one is
not noticed.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from contrastive_loss_helpers import run_on_ranks
from torch import Tensor
from training_helpers import ENGINES, Small, error, small, this_rank, whole_batch

CHUNKS, RANKS, BOUND = 3, 2, 1e-6


class Mutation(NamedTuple):
    """The gradient of `chunk` (-1: of all), of `rank` (-1: of both), or of the scale, times `factor`."""

    factor: float
    chunk: int = -1
    rank: int = -1
    is_scale: bool = False

    def __str__(self) -> str:
        what = "the scale" if self.is_scale else f"chunk {self.chunk}" if self.chunk >= 0 else "everything"
        where = f" of rank {self.rank}" if self.rank >= 0 else ""
        return f"{'drop' if self.factor == 0 else 'double'} {what}{where}"


def mutations() -> list[Mutation]:
    parts = [Mutation(1.0, chunk, rank) for chunk, rank in itertools.product(range(-1, CHUNKS), range(-1, RANKS))]
    parts += [Mutation(1.0, is_scale=True)]
    of_all = Mutation(1.0)  # is no mutation of a part, but a learning rate
    return [part._replace(factor=factor) for part in parts if part != of_all for factor in (0.0, 2.0)]


def broken(made: Small, mutation: Mutation) -> Small:
    """`made`, with that part of each step's gradient times the factor."""
    backward, tower, calls = made.cache._backward, made.cache.towers["clip"], [0]
    is_here = mutation.rank in (-1, made.processes.rank)

    def scaled(surrogate: Tensor) -> None:
        is_hit = is_here and mutation.chunk in (-1, calls[0] % CHUNKS)
        backward(surrogate * (mutation.factor if is_hit else 1.0))
        calls[0] += 1

    def with_scale(*inputs: Tensor) -> dict[str, Tensor]:
        outputs = tower(*inputs)
        scale = outputs["logit_scale"]
        return outputs | {"logit_scale": scale.detach() + mutation.factor * (scale - scale.detach())}

    if mutation.is_scale:
        made.cache.towers["clip"] = with_scale
    else:
        made.cache._backward = scaled
    return made


def errors() -> dict[str, float]:
    """Relative L2 of all weights after a step, by engine and mutation; "nothing" is the engine as it is."""
    processes, found = this_rank(), {}
    truth, _ = whole_batch(1)
    for kind, stage in ENGINES:
        for mutation in [None, *mutations()]:
            made = small(processes, kind, stage)
            if mutation:
                broken(made, mutation)
            made.steps(1)
            state = made.engine.full_state_dict()
            found[f"{kind} {stage}: {mutation or 'nothing'}"] = error(state, truth) if processes.is_first else 0.0
    return found


def survivors() -> list[str]:
    """What was not noticed, or was noticed where nothing was wrong."""
    alive = []
    for name, found in run_on_ranks(RANKS, errors, timeout=900)[0].items():
        is_sound = name.endswith(": nothing")
        print(f"{found:.1e}  {name}", flush=True)
        alive += [name] if (found > BOUND) == is_sound else []
    return alive


if __name__ == "__main__":
    found = survivors()
    print("not noticed:", found or "none")
    sys.exit(bool(found))
