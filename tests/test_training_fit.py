"""Runs that choose what fits their memory: in which order, and that the run is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from contrastive_loss_helpers import run_on_ranks
from training_helpers import losses, options, small_data, this_rank

from fastclip.errors import UserError
from fastclip.training import fit as fit_module
from fastclip.training.__main__ import parse
from fastclip.training.config import TrainConfig, read_config
from fastclip.training.fit import RECOMPUTES, SHARE, THIN, cheapest
from fastclip.training.loop import train
from fastclip.training.plan import memory

CONFIG = TrainConfig(model="debug", global_batch=8192, precision="fp32")
RANKS = 2
Choice = tuple[int, str, int]


def choice(capacity: float, config: TrainConfig = CONFIG, stages: tuple[int, ...] = (1, 2, 3)) -> Choice:
    chosen, need = cheapest(config, RANKS, capacity, stages)
    assert need.total == memory(chosen, RANKS).total <= SHARE * capacity
    return chosen.zero_stage, chosen.recompute, chosen.chunk_size


def needed(stage: int, recompute: str, chunk: int) -> float:
    """Capacity in which this just fits."""
    config = replace(CONFIG, zero_stage=stage, recompute=recompute, chunk_size=chunk)
    return 1.001 * memory(config, RANKS).total / SHARE


@pytest.mark.parametrize(
    "expected",
    [(1, "none", 4096), (1, "none", 512), (1, "none", THIN), (1, "selective", THIN), (1, "full", THIN), (1, "full", 8)],
)
def test_smaller_chunks_then_recompute(expected: Choice) -> None:
    """Each fits in what it needs, and nothing before it does."""
    assert choice(needed(*expected)) == expected


def test_a_higher_stage_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the stage takes away here; in truth DeepSpeed's 3 holds more than 1 below 10^9 parameters."""
    tried = []

    def counted(config: TrainConfig, world_size: int, text_tokens: float | None) -> SimpleNamespace:
        tried.append((config.zero_stage, config.recompute, config.chunk_size))
        return SimpleNamespace(total=1.0 / config.zero_stage)

    monkeypatch.setattr(fit_module, "memory", counted)
    chosen, _ = cheapest(CONFIG, RANKS, 0.51 / SHARE, (1, 2, 3))
    assert (chosen.zero_stage, chosen.recompute, chosen.chunk_size) == tried[-1] == (2, "none", 4096)
    halves = [4096, 2048, 1024, 512, 256, 128, 64]
    whole = [*halves, 32, 16, 8, 4, 2, 1]
    assert tried[:-1] == [(1, kind, size) for kind in RECOMPUTES for size in (whole if kind == "full" else halves)]


def test_what_is_given_is_the_most_that_is_taken() -> None:
    assert choice(1e12, replace(CONFIG, chunk_size=100)) == (1, "none", 100)
    chosen, _ = cheapest(CONFIG, RANKS, needed(1, "selective", 128), (1,), ("selective",))
    assert (chosen.recompute, chosen.chunk_size) == ("selective", 128)
    with pytest.raises(
        UserError, match=r"nothing fits in 85% of 0\.001 GB: the least is .* GB, at ZeRO-3, recompute full"
    ):
        choice(1e6)


def run(data: Path, out: Path, capacity: float) -> None:
    config = parse(options(data, out, global_batch=256, steps=2, zero_stage=1, chunk_size=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "_free_bytes", lambda device: capacity)
        train(replace(config, fit=bool(capacity)), this_rank())


def runs(data: Path, folder: Path, tight: float) -> None:
    for name, capacity in (("plain", 0.0), ("tight", tight), ("ample", 1e12)):
        run(data, folder / name, capacity)


def test_a_run_that_fits_has_the_same_curve(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = small_data(tmp_path / "data", count=256)
    config = replace(CONFIG, zero_stage=1, global_batch=256, chunk_size=THIN)
    run_on_ranks(RANKS, runs, data, tmp_path, 1.001 * memory(config, RANKS).total / SHARE)
    chosen = {name: read_config(tmp_path / name / "config.yaml", TrainConfig()) for name in ("plain", "tight", "ample")}
    assert {name: config.chunk_size for name, config in chosen.items()} == {"plain": 0, "tight": THIN, "ample": 128}
    assert not chosen["tight"].fit, "a resume must take what was chosen"
    for name in ("tight", "ample"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert f"GB free, at ZeRO-1, recompute none, chunk_size {THIN}" in capfd.readouterr().out


def test_the_recipes_of_large_runs_fit_themselves() -> None:
    assert parse(["--recipe", "openclip_laion", "--data", "x"], aloud=False).fit
    assert not parse(["--recipe", "demo", "--data", "x"], aloud=False).fit
    assert RECOMPUTES[0] == TrainConfig().recompute
