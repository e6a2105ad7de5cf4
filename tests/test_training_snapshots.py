"""Snapshots: what is mapped comes back, and a run whose processes died goes on from the newest whole one."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from contrastive_loss_helpers import run_on_ranks
from training_helpers import ENGINES, debug_model, lines, options, small_data, this_rank

from fastclip.models import get_config
from fastclip.training import loop, snapshots
from fastclip.training.__main__ import parse
from fastclip.training.checkpoint import NotSaved
from fastclip.training.config import TrainConfig
from fastclip.training.loop import train
from fastclip.training.mapped import MappedWriter, read_mapped
from fastclip.training.processes import Processes
from fastclip.training.snapshots import Snapshots
from fastclip.training.torch_engine import TorchEngine

STEPS, DIES_AT, TIMEOUT = 6, 4, 400


def test_a_mapped_state_comes_back(tmp_path: Path) -> None:
    path, write = tmp_path / "state.pt", MappedWriter()
    base = torch.arange(24.0).reshape(4, 6)
    state: dict[str, Any] = {
        "half": base.bfloat16(),
        "turned": base.T,
        "one": torch.tensor(7, dtype=torch.int64),
        "none": torch.empty(0, 3),
        "mask": base > 5,
        "deep": OrderedDict(a=[torch.ones(3), (2, torch.zeros(1))], b="text", size=torch.Size([2, 3])),
    }
    write(state, path)
    inode = path.stat().st_ino
    assert_same(read_mapped(path, weights_only=True), state)
    state["half"] += 1
    write(state, path)
    assert path.stat().st_ino == inode, "the file is written again, not made anew"
    assert_same(read_mapped(path, weights_only=True), state)
    MappedWriter()(state, path)
    assert path.stat().st_ino == inode
    write({"other": torch.ones(5)}, path)
    assert_same(read_mapped(path), {"other": torch.ones(5)})
    write({"no tensor": 1}, path)
    assert read_mapped(path) == {"no tensor": 1}


def assert_same(found: Any, truth: Any) -> None:
    if isinstance(truth, torch.Tensor):
        assert found.dtype == truth.dtype
        assert found.shape == truth.shape
        assert torch.equal(found, truth)
    elif isinstance(truth, dict):
        assert list(found) == list(truth)
        for key in truth:
            assert_same(found[key], truth[key])
    elif isinstance(truth, (list, tuple)):
        assert type(found) is type(truth)
        for one, other in zip(found, truth, strict=True):
            assert_same(one, other)
    else:
        assert found == truth


@pytest.fixture
def engine(processes: Processes) -> TorchEngine:
    return TorchEngine(debug_model(), TrainConfig(engine="torch", precision="fp32"), processes)


def of_a_run(run: Path, processes: Processes, **identity: Any) -> Snapshots:
    return Snapshots(run, get_config("debug"), {"engine": "torch"} | identity, processes)


def save(snapshots: Snapshots, engine: TorchEngine, step: int) -> None:
    loader = {"step": step, "skipped": {"unreadable image": 1}, "seen": {}}
    snapshots.save(step, engine, loader, {"elapsed": 1.5, "skipped_steps": 0})


def newest(run: Path, processes: Processes, **identity: Any) -> int | None:
    saved = of_a_run(run, processes, **identity).newest()
    return saved.step if saved else None


def test_the_newest_whole_one_is_taken(
    tmp_path: Path, processes: Processes, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert newest(tmp_path, processes) is None
    ours = of_a_run(tmp_path, processes)
    for step in (1, 2, 3):
        save(ours, engine, step)
        assert newest(tmp_path, processes) == step
    assert newest(tmp_path, processes, precision="bf16") is None
    again = of_a_run(tmp_path, processes)
    found = again.newest()
    assert found is not None
    assert found.loader == {"step": 3, "skipped": {"unreadable image": 1}, "seen": {}}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            save(again, engine, 4)
    assert newest(tmp_path, processes) == 3, "the one it went on from is not the one it writes over"
    monkeypatch.setattr(snapshots, "_boot", lambda: "another")
    assert newest(tmp_path, processes) is None


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for_torch(*_: Any, **__: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos: No space left on device")


@pytest.mark.parametrize(("place", "fault"), [("os.posix_fallocate", full), ("torch.save", full_for_torch)])
def test_a_full_disk_leaves_the_one_before(
    tmp_path: Path, processes: Processes, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, place: str, fault: Any
) -> None:
    ours = of_a_run(tmp_path, processes)
    save(ours, engine, 1)
    with monkeypatch.context() as patch:
        patch.setattr(place, fault)
        with pytest.raises(NotSaved, match=r"a snapshot in .* could not be written: .*No space left"):
            save(ours, engine, 2)
    assert newest(tmp_path, processes) == 1
    save(ours, engine, 3)
    assert newest(tmp_path, processes) == 3


class Killed(BaseException):
    """In place of SIGKILL: nothing is saved any more."""


def run(data: Path, out: Path, dies_at: int = 0, **changed: Any) -> None:
    """A whole run, or the part of one that is killed within step `dies_at`."""
    log = loop.Trainer._log

    def dying(trainer: loop.Trainer, *arguments: Any) -> None:
        if trainer.step == dies_at:
            raise Killed
        log(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(loop.Trainer, "_log", dying)
        train(parse(options(data, out, steps=STEPS, ema=0.9, ema_every=1, **changed)), this_rank())


def all_runs(data: Path, folder: Path, engines: list[tuple[str, int]]) -> None:
    for engine, stage in engines:
        choice = {"engine": engine, "zero_stage": stage}
        out, whole = folder / f"{engine}{stage}", folder / f"{engine}{stage}-whole"
        run(data, whole, **choice)
        run(data, out, DIES_AT, snapshot_every=1, save_every=2, **choice)
        if this_rank().is_first:
            assert sorted(path.name for path in (out / "snapshots").iterdir()) == ["0", "1"]
        this_rank().barrier()
        run(data, out, snapshot_every=1, resume="latest", **choice)


ENGINE = [
    pytest.param([("deepspeed", 2)], id="deepspeed2"),
    pytest.param(list(ENGINES), marks=pytest.mark.long, id="all"),
]


@pytest.mark.parametrize("engines", ENGINE)
def test_a_killed_run_goes_on_bit_equal(
    tmp_path: Path, engines: list[tuple[str, int]], capfd: pytest.CaptureFixture[str]
) -> None:
    run_on_ranks(2, all_runs, small_data(tmp_path / "data"), tmp_path, engines, timeout=TIMEOUT)
    assert capfd.readouterr().out.count("/snapshots/") == len(engines), "it went on from a snapshot, not a checkpoint"
    for engine, stage in engines:
        out, whole = tmp_path / f"{engine}{stage}", tmp_path / f"{engine}{stage}-whole"
        ours, truth = ([(line["step"], line["loss"], line["samples"]) for line in lines(one)] for one in (out, whole))
        assert ours == truth
        for name in ("model.safetensors", "ema/model.safetensors"):
            weights = Path("checkpoints") / f"step_{STEPS:08d}" / name
            assert (out / weights).read_bytes() == (whole / weights).read_bytes()
        assert not (out / "snapshots").exists(), "at its end a run needs them no more"


def begun_anew(data: Path, out: Path) -> None:
    choice = {"engine": "torch", "snapshot_every": 1}
    run(data, out, DIES_AT, **choice)
    run(data, out, 1, **choice, optimizer="lion", resume="latest")  # says that it begins anew
    assert not (out / "snapshots").exists()
    run(data, out, DIES_AT, **choice)
    run(data, out, 1, **choice)
    run(data, out, **choice, resume="latest")


def test_a_run_that_begins_anew_forgets_the_snapshots_of_the_one_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run_on_ranks(1, begun_anew, small_data(tmp_path / "data"), out, timeout=TIMEOUT)
    assert capfd.readouterr().out.count("The snapshots are left out: ") == 1
    assert [line["step"] for line in lines(out)] == list(range(1, STEPS + 1))
