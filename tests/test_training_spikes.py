"""A loss that jumps: the run goes back to its last checkpoint and on with the data behind the jump."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from contrastive_loss_helpers import run_on_ranks
from safetensors.torch import load_file
from training_helpers import lines, options, small_data, this_rank

from fastclip.errors import UserError
from fastclip.training import loop
from fastclip.training.__main__ import parse
from fastclip.training.config import TrainConfig
from fastclip.training.loop import train
from fastclip.training.spikes import LEAST, WINDOW, Spikes

SPIKE, SAVED, STEPS = 25, 24, 27


def test_what_a_spike_is() -> None:
    spikes = Spikes(3)
    assert not any(spikes.look(loss) for loss in [9.0] * (LEAST - 1) + [99.0])  # too early
    assert not spikes.look(27.0)
    assert not spikes.look(float("nan"))
    assert spikes.look(27.1)
    assert spikes.look(28.0)  # the one before has not moved the median
    assert not any(spikes.look(1.0) for _ in range(WINDOW))
    assert spikes.look(3.1)


def test_a_factor_of_one_is_none() -> None:
    with pytest.raises(UserError, match=r"spike must be 0 or above 1, was 0\.5"):
        TrainConfig(spike=0.5)
    with pytest.raises(UserError, match="set save_every"):
        TrainConfig(spike=3.0)


def runs(data: Path, folder: Path, changed: dict[str, Any]) -> None:
    """One whose loss at step SPIKE is a hundred times what it should be, and one whose steps SAVED + 1 to SPIKE change
    nothing."""
    common = {"chunk_size": 8, "steps": STEPS, "save_every": 4, "schedule": "constant", "warmup": 0} | changed
    compute, calls = loop.Loss.__call__, [0]

    def jumps(self: loop.Loss, *features: Any, **named: Any) -> torch.Tensor:
        calls[0] += 1
        return compute(self, *features, **named) * (100 if calls[0] == SPIKE else 1)

    def vanishes(self: loop.Loss, *features: Any, **named: Any) -> torch.Tensor:
        calls[0] += 1
        return compute(self, *features, **named) * (float("nan") if SAVED < calls[0] <= SPIKE else 1)

    for name, loss, spike in (("rolled", jumps, 3.0), ("skipped", vanishes, 0.0)):
        calls[0] = 0
        with patch.object(loop.Loss, "__call__", loss):
            train(parse(options(data, folder / name, spike=spike, **common)), this_rank())


@pytest.mark.parametrize(
    "changed",
    [{"engine": "torch"}, *(pytest.param({"zero_stage": stage}, marks=pytest.mark.long) for stage in (2, 3))],
    ids=str,
)
def test_the_run_goes_back_and_on(changed: dict[str, Any], tmp_path: Path) -> None:
    """As if the steps since the checkpoint had been skipped; their samples are named."""
    data = small_data(tmp_path / "data")
    run_on_ranks(2, runs, data, tmp_path, changed)
    last = Path("checkpoints") / f"step_{STEPS:08d}" / "model.safetensors"
    rolled, skipped = (load_file(tmp_path / name / last) for name in ("rolled", "skipped"))
    for name, value in skipped.items():
        torch.testing.assert_close(rolled[name], value, rtol=0, atol=0)
    (line,) = [json.loads(text) for text in (tmp_path / "rolled" / "quarantine.jsonl").read_text().splitlines()]
    assert (line["step"], line["ranks"], len(set(line["keys"]))) == (SPIKE, [0, 1], 16)
    assert line["loss"] == lines(tmp_path / "rolled")[SPIKE - 1]["loss"]
