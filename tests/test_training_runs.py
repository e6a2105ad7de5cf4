"""Whole runs on two ranks: one loss curve under every engine, stage and chunk size, and resumes that are bit-equal."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from contrastive_loss_helpers import run_on_ranks
from training_helpers import ENGINES, lines, losses, options, small_data, this_rank
from training_helpers import run as launched

from fastclip.training.__main__ import parse
from fastclip.training.loop import train
from fastclip.training.metrics import KEYS

STEPS, TIMEOUT = 6, 400


def run(data: Path, out: Path, **changed: Any) -> None:
    train(parse(options(data, out, steps=STEPS, save_every=3, **changed)), this_rank())


def all_runs(data: Path, folder: Path, precision: str) -> None:
    """A run of every engine, each taken up again at step 3 as if it had been killed after step 6."""
    for engine, stage in ENGINES:
        choice = {"engine": engine, "zero_stage": stage, "precision": precision}
        out, again = folder / f"{engine}{stage}", folder / f"{engine}{stage}-again"
        run(data, out, **choice)
        if this_rank().is_first:
            shutil.copytree(out, again)
        this_rank().barrier()
        run(data, again, resume=again / "checkpoints" / "step_00000003", **choice)
    run(data, folder / "half", chunk_size=2, precision=precision)
    for name, chunk_size in (("muon", 4), ("muon-half", 2)):
        run(data, folder / name, chunk_size=chunk_size, precision=precision, optimizer="muon", zero_stage=2)


def runs_of(folder: Path, precision: str) -> Path:
    run_on_ranks(2, all_runs, small_data(folder / "data"), folder, precision, timeout=TIMEOUT)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs_of(tmp_path_factory.mktemp("runs"), "fp32")


@pytest.fixture(scope="module")
def bf16_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs_of(tmp_path_factory.mktemp("runs"), "bf16")


def assert_went_on_bit_equal(out: Path) -> None:
    again = out.with_name(f"{out.name}-again")
    changing = {"samples_per_s", "data_wait", "step_time", "stall", "elapsed"}
    ours, theirs = ([{k: line[k] for k in KEYS if k not in changing} for line in lines(run)] for run in (again, out))
    assert len(theirs) == STEPS
    assert ours == theirs
    assert lines(again)[:3] == lines(out)[:3]
    assert lines(again)[4]["elapsed"] != lines(out)[4]["elapsed"], "the steps were not done again"
    weights = ("checkpoints", "step_00000006", "model.safetensors")
    assert again.joinpath(*weights).read_bytes() == out.joinpath(*weights).read_bytes()


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_one_loss_curve(runs: Path, engine: str, stage: int) -> None:
    assert losses(runs / f"{engine}{stage}") == pytest.approx(losses(runs / "torch0"), rel=1e-5)


@pytest.mark.parametrize(("half", "whole"), [("half", "deepspeed1"), ("muon-half", "muon")])
def test_half_the_chunk_size_gives_the_same_curve(runs: Path, half: str, whole: str) -> None:
    assert losses(runs / half) == pytest.approx(losses(runs / whole), rel=1e-5)
    assert len(set(losses(runs / half))) == STEPS


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_a_resumed_run_goes_on_bit_equal(runs: Path, engine: str, stage: int) -> None:
    assert_went_on_bit_equal(runs / f"{engine}{stage}")


@pytest.mark.long
@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_a_resumed_run_in_bf16_goes_on_bit_equal(bf16_runs: Path, engine: str, stage: int) -> None:
    assert_went_on_bit_equal(bf16_runs / f"{engine}{stage}")


MOVES = [("deepspeed3", "deepspeed", 2), ("deepspeed2", "torch", 0), ("torch0", "deepspeed", 3)]


@pytest.mark.parametrize(("source", "engine", "stage"), MOVES)
def test_a_run_goes_on_with_one_rank_at_another_stage(runs: Path, source: str, engine: str, stage: int) -> None:
    """From two ranks, by parameter name: the same samples, the same curve."""
    out = runs / f"{source}-moved"
    step = runs / source / "checkpoints" / "step_00000003"
    again = options(runs / "data", out, steps=STEPS, resume=step, engine=engine, zero_stage=stage, workers=0)
    result = launched("python", again)
    assert result.returncode == 0, result.stderr
    assert losses(out) == pytest.approx(losses(runs / source)[3:], rel=1e-5)
    assert lines(out)[0]["step"] == 4


@pytest.mark.long
def test_a_run_goes_on_with_more_ranks(runs: Path) -> None:
    one, two = runs / "one", runs / "two"
    result = launched("python", options(runs / "data", one, steps=STEPS, save_every=3, zero_stage=1))
    assert result.returncode == 0, result.stderr
    run_on_ranks(2, run_moved, runs / "data", two, one / "checkpoints" / "step_00000003", timeout=TIMEOUT)
    assert losses(two) == pytest.approx(losses(one)[3:], rel=1e-5)


def run_moved(data: Path, out: Path, step: Path) -> None:
    run(data, out, resume=step, zero_stage=3)


def test_a_run_folder_is_whole(runs: Path) -> None:
    out = runs / "deepspeed1"
    names = {"config.yaml", "ds_config.json", "environment.json", "tokenizer.json", "metrics.jsonl", "report.html"}
    assert names <= {path.name for path in out.iterdir()}
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_00000003", "step_00000006"]
    assert (out / "latest").read_text() == "step_00000006\n"
    assert tuple(lines(out)[-1]) == KEYS
    assert lines(out)[-1]["samples"] == 16 * STEPS
