"""The global contrastive loss in the trainer: on any number of ranks, and what it remembers goes on with a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training_helpers import losses, options, run, small_data

from fastclip.errors import UserError
from fastclip.training.config import TrainConfig

STEPS, HALF = 8, 4  # an epoch each
ASKED = {"global_weight": 1.0, "contrastive_weight": 0.0, "global_rho": 6.5, "global_gamma_epochs": 2, "lr": 1e-3}
ASKED |= {"steps": STEPS, "save_every": HALF, "snapshot_every": 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data, and alone: a run of one rank."""
    folder = tmp_path_factory.mktemp("global")
    small_data(folder / "data")
    done = run("python", options(folder / "data", folder / "alone", engine="torch", **ASKED))
    assert done.returncode == 0, done.stderr
    return folder


def half(runs: Path, name: str) -> Path:
    """A copy of the run as it was in its middle."""
    copy = runs / name
    shutil.copytree(runs / "alone", copy, symlinks=True)
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")
    (copy / "latest").write_text(f"step_{HALF:08d}\n")
    return copy


def test_two_ranks_train_as_one(runs: Path) -> None:
    done = run("deepspeed", options(runs / "data", runs / "two", zero_stage=2, **ASKED))
    assert done.returncode == 0, done.stderr
    assert losses(runs / "two") == pytest.approx(losses(runs / "alone"), rel=1e-5)


@pytest.mark.parametrize(("ranks", "launcher", "bound"), [(1, "python", 0.0), (2, "torchrun", 1e-5)])
def test_a_run_goes_on(runs: Path, ranks: int, launcher: str, bound: float) -> None:
    """Bit-equal on one rank; on two, which find the parts of one."""
    again = half(runs, f"again_{ranks}")
    done = run(launcher, options(runs / "data", again, engine="torch", resume="latest", **ASKED))
    assert done.returncode == 0, done.stderr
    assert losses(again)[HALF:] == pytest.approx(losses(runs / "alone")[HALF:], rel=bound, abs=0)


def test_what_is_remembered_matters(runs: Path) -> None:
    """A run whose past was taken away says so and does not go on."""
    again = half(runs, "forgotten")
    folder = again / "checkpoints" / f"step_{HALF:08d}"
    (folder / "state" / "normalisers_0.pt").unlink()
    manifest = folder / "manifest.json"
    lines = manifest.read_text()
    assert "state/normalisers_0.pt" in lines
    done = run("python", options(runs / "data", again, engine="torch", resume="latest", **ASKED))
    assert done.returncode == 2
    assert "is incomplete: state/normalisers_0.pt is missing" in done.stderr


def test_a_run_without_it_is_not_taken_up(runs: Path) -> None:
    plain = {"steps": HALF, "engine": "torch"}
    assert run("python", options(runs / "data", runs / "plain", **plain)).returncode == 0
    asked = options(runs / "data", runs / "plain", engine="torch", resume="latest", **ASKED)
    done = run("python", asked)
    assert done.returncode == 2
    assert "is of a run without --global-weight, which needs a new run" in done.stderr


def test_mistakes() -> None:
    with pytest.raises(UserError, match="global_gamma must be above 0 and at most 1, was 0"):
        TrainConfig(global_gamma=0.0)
    with pytest.raises(UserError, match="the weights of all losses are 0"):
        TrainConfig(contrastive_weight=0.0)
