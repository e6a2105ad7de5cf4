"""Checkpoints: whole or not there at whatever instant a save breaks off, the right one found, damage refused."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import debug_model, small_data

from fastclip.data import Tokenizer, get_tokenizer
from fastclip.errors import UserError
from fastclip.models import get_config, load_checkpoint
from fastclip.training import step_folder
from fastclip.training.checkpoint import Checkpoints, find_checkpoint
from fastclip.training.config import TrainConfig
from fastclip.training.processes import Processes
from fastclip.training.step_folder import clean, write_atomically
from fastclip.training.torch_engine import TorchEngine
from fastclip.training.watchdog import Watchdog

IDENTITY = {"engine": "torch", "world_size": 1}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return get_tokenizer(str(small_data(tmp_path_factory.mktemp("t") / "data", 4) / "tokenizer.json"), 32)


@pytest.fixture
def engine(processes: Processes) -> TorchEngine:
    return TorchEngine(debug_model(), TrainConfig(engine="torch", precision="fp32"), processes)


@pytest.fixture
def checkpoints(tmp_path: Path, tokenizer: Tokenizer, processes: Processes) -> Checkpoints:
    return Checkpoints(tmp_path / "run", get_config("debug"), tokenizer, IDENTITY, processes, keep=2)


def save(checkpoints: Checkpoints, engine: TorchEngine, step: int) -> Path:
    return checkpoints.save(step, engine, {"step": step}, {"elapsed": step / 2})


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in (checkpoints.run / "checkpoints").iterdir())


def test_what_is_saved_is_found_checked_and_loaded(checkpoints: Checkpoints, engine: TorchEngine) -> None:
    folder = save(checkpoints, engine, 3)
    random = torch.rand(2)
    truth = {name: value.clone() for name, value in engine.model.state_dict().items()}
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.zero_()
    for resume in ("latest", str(checkpoints.run), str(folder)):
        assert find_checkpoint(resume, checkpoints.run) == folder
    saved = checkpoints.check(folder)
    assert (saved.step, saved.loader, saved.progress) == (3, {"step": 3}, {"elapsed": 1.5})
    checkpoints.load(saved, engine)
    assert all(torch.equal(value, truth[name]) for name, value in engine.model.state_dict().items())
    assert torch.equal(torch.rand(2), random)
    model = load_checkpoint(checkpoints.run).model
    assert all(torch.equal(value, truth[name]) for name, value in model.state_dict().items())


def test_a_process_that_ends_beside_a_dead_one_brings_its_checkpoint_to_its_end(
    checkpoints: Checkpoints, engine: TorchEngine, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = checkpoints._complete

    def slowly(*arguments: Any) -> None:
        time.sleep(0.5)
        complete(*arguments)

    monkeypatch.setattr(checkpoints, "_complete", slowly)
    monkeypatch.setattr(os, "_exit", lambda status: None)
    checkpoints.in_background = True
    watchdog = Watchdog(processes, 10.0)
    watchdog.before_end = checkpoints.settle
    folder = save(checkpoints, engine, 1)
    assert not folder.exists()
    watchdog._end(1, "rank 1 has died", is_known=True)
    assert checkpoints.check(folder).step == 1


def test_the_newest_are_kept(checkpoints: Checkpoints, engine: TorchEngine) -> None:
    for step in (1, 2, 3):
        save(checkpoints, engine, step)
    assert names(checkpoints) == ["step_00000002", "step_00000003"]
    assert (checkpoints.run / "latest").read_text() == "step_00000003\n"


def test_a_run_that_went_back_keeps_what_it_writes(checkpoints: Checkpoints, engine: TorchEngine) -> None:
    """With later steps of its abandoned future beside it, the new checkpoint is no old one."""
    for step in (7, 8, 3):
        folder = save(checkpoints, engine, step)
    assert folder.is_dir()
    assert find_checkpoint("latest", checkpoints.run) == folder
    again = save(checkpoints, engine, 8)
    assert names(checkpoints) == ["step_00000007", "step_00000008"]
    assert checkpoints.check(again).step == 8


def test_there_is_nothing_to_resume_yet(tmp_path: Path) -> None:
    assert find_checkpoint("", tmp_path) is None
    assert find_checkpoint("latest", tmp_path / "none") is None
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_checkpoint(str(tmp_path / "none"), tmp_path)


INSTANTS = {
    "engine state": "fastclip.training.torch_engine.TorchEngine.save_state",
    "random states": "fastclip.training.checkpoint.random_states",
    "weights": "fastclip.training.checkpoint.save_model",
    "manifest": "fastclip.training.checkpoint.write_manifest",
    "flush": "fastclip.training.step_folder.flush",
    "removal of the old": "fastclip.training.checkpoint.remove",
    "latest": "fastclip.training.checkpoint.write_atomically",
    "deletion": "fastclip.training.step_folder.shutil.rmtree",
}


@pytest.mark.parametrize("instant", INSTANTS)
@pytest.mark.parametrize("existing", [(1, 2), (1, 2, 3)])
def test_a_save_that_breaks_off_leaves_a_whole_one(
    checkpoints: Checkpoints,
    engine: TorchEngine,
    monkeypatch: pytest.MonkeyPatch,
    instant: str,
    existing: tuple[int, ...],
) -> None:
    for step in existing:
        save(checkpoints, engine, step)
    (checkpoints.run / "latest").write_text("step_00000002\n")

    def break_off(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(INSTANTS[instant], break_off)
        with pytest.raises(KeyboardInterrupt):
            save(checkpoints, engine, 3)
    found = find_checkpoint("latest", checkpoints.run)
    assert found is not None
    assert checkpoints.check(found).step == (3 if instant == "deletion" and existing == (1, 2) else 2)
    clean(checkpoints.run)
    assert all(name.startswith("step_") for name in names(checkpoints))
    for name in names(checkpoints):
        checkpoints.check(checkpoints.run / "checkpoints" / name)
    assert save(checkpoints, engine, 4).is_dir()
    assert names(checkpoints)[-1] == "step_00000004"


def test_a_lost_pointer_means_the_last_whole_step(checkpoints: Checkpoints, engine: TorchEngine) -> None:
    save(checkpoints, engine, 1)
    folder = save(checkpoints, engine, 2)
    (checkpoints.run / "latest").write_text("step_00000009\n")
    assert find_checkpoint("latest", checkpoints.run) == folder


DAMAGE = {
    "a byte": "is damaged: model.safetensors is not what its manifest says",
    "a length": "is damaged: state/torch.pt is not what its manifest says",
    "a file": "is incomplete: state/random_0.pt is missing",
    "the manifest": "is damaged: manifest.json cannot be read",
    "its keys": "is damaged: manifest.json lacks 'step'",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused(checkpoints: Checkpoints, engine: TorchEngine, kind: str) -> None:
    folder = save(checkpoints, engine, 1)
    if kind == "a byte":
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-5] ^= 1
        (folder / "model.safetensors").write_bytes(content)
    elif kind == "a length":
        with (folder / "state" / "torch.pt").open("ab") as file:
            file.write(b"x")
    elif kind == "a file":
        (folder / "state" / "random_0.pt").unlink()
    else:
        (folder / "manifest.json").write_text("{" if kind == "the manifest" else "{}")
    with pytest.raises(UserError, match=DAMAGE[kind]):
        checkpoints.check(folder)


def test_another_run_is_refused(checkpoints: Checkpoints, engine: TorchEngine) -> None:
    folder = save(checkpoints, engine, 1)
    checkpoints.identity = IDENTITY | {"precision": "bf16"}
    with pytest.raises(UserError, match="was written with precision = None; this run has precision = bf16"):
        checkpoints.check(folder)
    checkpoints.identity = IDENTITY | {"world_size": 2}
    assert checkpoints.check(folder).moved == "world_size 1 -> 2"
    checkpoints.is_portable = False
    checkpoints.identity = IDENTITY
    folder = save(checkpoints, engine, 2)
    checkpoints.identity = IDENTITY | {"world_size": 2}
    with pytest.raises(UserError, match=r"world_size = 1 and holds no optimizer\.safetensors \(--portable"):
        checkpoints.check(folder)
    vision = dataclasses.replace(checkpoints.model.vision, layers=3)
    checkpoints.model = dataclasses.replace(checkpoints.model, vision=vision)
    with pytest.raises(UserError, match=r"another architecture than --model: vision\.layers is 2, not 3"):
        checkpoints.check(folder)


def test_a_file_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "first")

    def break_off(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(step_folder, "flush", break_off)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "second")
    assert path.read_text() == "first"
