"""The optimizer's state by parameter name: what one engine gives another takes up, step for step, at any stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contrastive_loss_helpers import run_on_ranks
from training_helpers import ENGINES, State, debug_model, error, small, this_rank

from fastclip.training.engine import Engine
from fastclip.training.processes import Processes

TIMEOUT = 400


def handed_over(engine: Engine, processes: Processes) -> tuple[State, State]:
    """(weights, moments) on every rank, as if read from a checkpoint."""
    return processes.gather((engine.full_state_dict(), engine.optimizer_state()))[0]


def distance(ours: State, truth: State) -> float:
    """|ours - truth| / |truth - initial weights|."""
    start = {name: value.float() for name, value in debug_model().state_dict().items()}
    return error(ours, truth) / error(start, truth)


def moved(settings: dict[str, Any], pairs: list[tuple[tuple[str, int], tuple[str, int]]]) -> dict[str, Any]:
    """Two steps, a move, two more steps: the distance from four without one, and what is not read back as it was."""
    processes, found, sources = this_rank(), {}, {}
    for source, target in pairs:
        if source not in sources:
            made = small(processes, *source, **settings)
            made.steps(2)
            state = handed_over(made.engine, processes)
            made.steps(2, first=2)
            sources[source] = state, made.engine.full_state_dict()
        (weights, moments), truth = sources[source]
        other = small(processes, *target, weights=weights, **settings)
        other.engine.load_portable(weights, moments)
        again = handed_over(other.engine, processes)
        other.steps(2, first=2)
        ours = other.engine.full_state_dict()
        if processes.is_first:
            lost = [
                name
                for now, was in zip(again, (weights, moments), strict=True)
                for name in was.keys() | now.keys()
                if name not in was or name not in now or not torch.equal(now[name].flatten(), was[name].flatten())
            ]
            found[f"{source} {target}"] = (distance(ours, truth), lost)
    return found


RING = list(zip(ENGINES, ENGINES[1:] + ENGINES[:1], strict=True))
ACROSS = [(ENGINES[4], ENGINES[3]), (ENGINES[4], ENGINES[4]), (ENGINES[3], ENGINES[0])]


@pytest.fixture(scope="module")
def adamw() -> dict[str, Any]:
    return run_on_ranks(2, moved, {"optimizer": "adamw"}, RING, timeout=TIMEOUT)[0]


@pytest.mark.parametrize(("source", "target"), RING)
def test_adamw_moves_to_the_next_engine(adamw: dict[str, Any], source: Any, target: Any) -> None:
    """Nothing is lost on the way; afterwards the engines differ by the order of their sums."""
    away, lost = adamw[f"{source} {target}"]
    assert lost == []
    assert away < 2e-5


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"optimizer": "adamw", "precision": "bf16"}, 0.1),
        ({"optimizer": "lion"}, 0.02),  # a sign may turn where a sum is 0
    ],
)
def test_other_settings_move_too(settings: dict[str, Any], bound: float) -> None:
    for pair, (away, lost) in run_on_ranks(2, moved, settings, RING + ACROSS, timeout=TIMEOUT)[0].items():
        assert lost == [], pair
        assert away < bound, pair
