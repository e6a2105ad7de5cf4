"""The moving average of the weights: its formula, at every engine, kept in the checkpoints and taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import options, run, small_data

from fastclip.errors import UserError
from fastclip.models import load_checkpoint
from fastclip.training.__main__ import main
from fastclip.training.average import WeightAverage
from fastclip.training.config import TrainConfig

EMA, EVERY = 0.8, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("small") / "data")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def check_average(folder: Path, steps: tuple[int, ...]) -> None:
    """The average in the run folder is that of the weights that the run saved behind `steps`."""
    expected: dict[str, torch.Tensor] = {}
    for step in steps:
        now = {name: value.double() for name, value in weights(folder / f"checkpoints/step_{step:08d}").items()}
        factor = EMA**EVERY if expected else 0.0
        expected = {name: factor * expected.get(name, value) + (1 - factor) * value for name, value in now.items()}
    found = weights(folder / "ema")
    assert (folder / "ema").resolve() == (folder / f"checkpoints/step_{steps[-1]:08d}/ema").resolve()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_the_formula() -> None:
    class Both:
        is_first = True

        def __init__(self) -> None:
            self.state: dict[str, torch.Tensor] = {}

        def full_state_dict(self) -> dict[str, torch.Tensor]:
            return self.state

    both: Any = Both()
    average = WeightAverage(EMA, EVERY, both, both)
    expected = None
    for step in range(1, 9):
        both.state = {"w": torch.randn(2), "num_batches_tracked": torch.tensor(step)}
        average.look(step)
        if step % EVERY == 0:
            now = both.state["w"].double()
            expected = now if expected is None else EMA**EVERY * expected + (1 - EMA**EVERY) * now
            assert average.weights is not None
            torch.testing.assert_close(average.weights["w"].double(), expected, rtol=1e-6, atol=1e-7)
            assert average.weights["num_batches_tracked"] == step


def test_it_is_in_every_checkpoint_and_goes_on_from_there(data: Path, tmp_path: Path) -> None:
    """The average of a run that was resumed is that of one that was not, and of the weights that it saved itself."""
    common: dict[str, Any] = {"engine": "torch", "ema": EMA, "ema_every": EVERY, "save_every": 2, "keep": 9}
    common["schedule"] = "constant"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(options(data, whole, steps=6, **common)) == 0
    assert main(options(data, parts, steps=4, **common)) == 0
    assert main(options(data, parts, steps=6, resume="latest", **common)) == 0
    for folder in (whole, parts):
        check_average(folder, (2, 4, 6))
    assert load_checkpoint(parts / "ema").model.logit_scale.shape == (1,)


@pytest.mark.long
def test_it_is_of_whole_weights_under_zero_3(data: Path, tmp_path: Path) -> None:
    done = run("torchrun", options(data, tmp_path / "run", zero_stage=3, ema=EMA, ema_every=EVERY, save_every=2))
    assert done.returncode == 0, done.stderr
    check_average(tmp_path / "run", (2, 4))


@pytest.mark.parametrize("changed", [{"ema": 1.0}, {"ema": -0.1}, {"ema_every": 0}])
def test_what_is_no_decay(changed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"ema.* must be at least"):
        TrainConfig(**changed)
