"""The global contrastive loss in the trainer: on any number of ranks, and what it remembers goes on with a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_helpers import losses, options, run, small_data

from fastclip.data import get_tokenizer
from fastclip.errors import UserError
from fastclip.losses.normalisers import Normalisers
from fastclip.models import get_config
from fastclip.training.checkpoint import Checkpoints, Saved
from fastclip.training.config import TrainConfig
from fastclip.training.loss import Loss
from fastclip.training.processes import Processes

STEPS, HALF = 8, 4  # an epoch each
ASKED: dict[str, Any] = {"global_weight": 1.0, "contrastive_weight": 0.0, "global_rho": 6.5, "global_gamma_epochs": 2}
ASKED |= {"lr": 1e-3, "steps": STEPS, "save_every": HALF, "snapshot_every": 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data, and alone: a run of one rank."""
    folder = tmp_path_factory.mktemp("global")
    small_data(folder / "data")
    done = run("python", options(folder / "data", folder / "alone", engine="torch", **ASKED))
    assert done.returncode == 0, done.stderr
    return folder


def goes_on(runs: Path, launcher: str) -> list[float]:
    """The losses behind its middle of a run that was stopped there, by those of one rank."""
    again = runs / launcher
    shutil.copytree(runs / "alone", again, symlinks=True)
    shutil.rmtree(again / "checkpoints" / f"step_{STEPS:08d}")
    (again / "latest").write_text(f"step_{HALF:08d}\n")
    done = run(launcher, options(runs / "data", again, engine="torch", resume="latest", **ASKED))
    assert done.returncode == 0, done.stderr
    return losses(again)[HALF:]


def test_a_run_goes_on_bit_equal(runs: Path) -> None:
    manifest = json.loads((runs / "alone" / "checkpoints" / f"step_{HALF:08d}" / "manifest.json").read_text())
    assert "state/normalisers_0.pt" in manifest["files"]
    assert goes_on(runs, "python") == losses(runs / "alone")[HALF:]


@pytest.mark.long
def test_two_ranks_train_as_one(runs: Path) -> None:
    """From the start, and from the middle of a run of one, whose part they share out."""
    done = run("deepspeed", options(runs / "data", runs / "two", zero_stage=2, **ASKED))
    assert done.returncode == 0, done.stderr
    truth = losses(runs / "alone")
    assert losses(runs / "two") == pytest.approx(truth, rel=1e-5)
    assert goes_on(runs, "torchrun") == pytest.approx(truth[HALF:], rel=1e-5)


def test_the_share_of_a_batch_goes_down_along_half_a_cosine(processes: Processes) -> None:
    loss = Loss(TrainConfig(global_weight=1.0, global_gamma=0.2, global_gamma_epochs=4), processes, 9)
    found = []
    for epoch in range(6):
        loss.begin(epoch)
        assert loss.over_all_data is not None
        found.append(loss.over_all_data.gamma)
    assert found == pytest.approx([1, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2 + 0.4 * (1 - 0.5**0.5), 0.2, 0.2])


def test_a_run_without_it_is_not_taken_up(tmp_path: Path, processes: Processes) -> None:
    data = small_data(tmp_path / "data", 4)
    tokenizer = get_tokenizer(str(data / "tokenizer.json"), 32)
    checkpoints = Checkpoints(tmp_path / "run", get_config("debug"), tokenizer, {}, processes, 3)
    (tmp_path / "step" / "state").mkdir(parents=True)
    with pytest.raises(UserError, match="is of a run without --global-weight, which needs a new run"):
        checkpoints.load_normalisers(Saved(tmp_path / "step", 3, {}, {}, {}), Normalisers(4))


def test_mistakes() -> None:
    with pytest.raises(UserError, match="global_gamma must be above 0 and at most 1, was 0"):
        TrainConfig(global_gamma=0.0)
    with pytest.raises(UserError, match="the weights of all losses are 0"):
        TrainConfig(contrastive_weight=0.0)
