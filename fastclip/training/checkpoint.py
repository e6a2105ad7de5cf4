"""Checkpoints that are whole or not there: written aside, hashed, flushed to disk, renamed, and only then named latest.

    runs/x/latest                                   the name of the newest step folder
    runs/x/checkpoints/step_00000500/manifest.json  what the folder holds, with the sha256 of every file
                                     model.safetensors, open_clip_config.json, tokenizer.json: a model to use anywhere
                                     data.json      where the loader and the run stood
                                     state/         what the engine needs to go on, bit for bit
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastclip.errors import UserError
from fastclip.models.checkpoint import LATEST, STEPS, resolve_checkpoint, save_model
from fastclip.models.config import CLIPConfig
from fastclip.training.engine import Engine
from fastclip.training.processes import Processes

MANIFEST, DATA, STATE = "manifest.json", "data.json", "state"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Resumed:
    """Where a run stood."""

    step: int
    loader: dict[str, Any]
    progress: dict[str, Any]


def save_checkpoint(
    run: Path,
    step: int,
    engine: Engine,
    processes: Processes,
    model: CLIPConfig,
    tokenizer: Path,
    loader: dict[str, Any],
    progress: dict[str, Any],
    identity: dict[str, Any],
    keep: int,
) -> Path:
    """Writes step folder `step` of `run`; called on every rank, returns when it is safe on disk.

    identity: what must be the same to go on (engine, world size, ZeRO stage, precision).
    """
    steps = run / STEPS
    final, aside = steps / f"step_{step:08d}", steps / f".writing_{step:08d}"
    if processes.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / STATE).mkdir(parents=True)
    processes.barrier()
    engine.save_state(aside / STATE)
    torch.save(_random_states(), aside / STATE / f"random_{processes.rank}.pt")
    weights = engine.full_state_dict()
    processes.barrier()
    if processes.is_first:
        save_model(aside, weights, model, {"tokenizer.json": tokenizer})
        (aside / DATA).write_text(json.dumps({"loader": loader, "progress": progress}))
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        manifest = {
            "step": step,
            "identity": identity,
            "files": {
                str(path.relative_to(aside)): {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in files
            },
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*files, aside / MANIFEST, *(p for p in aside.rglob("*") if p.is_dir()), aside]:
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _flush(steps)
        _write_atomically(run / LATEST, f"{final.name}\n")
        for old in sorted(steps.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    processes.barrier()
    return final


def load_checkpoint(
    folder: Path, engine: Engine, processes: Processes, model: CLIPConfig, identity: dict[str, Any]
) -> Resumed:
    """Puts the engine, the random generators and the run's progress back where `folder` left them.

    Raises UserError naming what differs: another model, engine, world size, stage or precision, or a damaged file.
    """
    manifest = _read_json(folder / MANIFEST)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"checkpoint {folder} is incomplete: {name} is missing")
        if path.stat().st_size != entry["bytes"] or (processes.is_first and _sha256(path) != entry["sha256"]):
            raise UserError(f"checkpoint {folder} is damaged: {name} is not what its manifest says")
    saved_model = CLIPConfig.from_dict(_read_json(folder / "open_clip_config.json"))
    if saved_model != model:
        raise UserError(f"checkpoint {folder} holds another architecture than the run's model: give its --model")
    for key, value in identity.items():
        if manifest["identity"].get(key) != value:
            saved = manifest["identity"].get(key)
            raise UserError(f"checkpoint {folder} was written with {key} = {saved}, this run has {key} = {value}")
    engine.load_state(folder / STATE)
    _set_random_states(torch.load(folder / STATE / f"random_{processes.rank}.pt", weights_only=True))
    data = _read_json(folder / DATA)
    return Resumed(manifest["step"], data["loader"], data["progress"])


def find_checkpoint(resume: str, run: Path) -> Path | None:
    """The step folder that `resume` means: None for "" and for "latest" of a run that has none yet."""
    if not resume:
        return None
    if resume == "latest":
        try:
            return resolve_checkpoint(run)
        except FileNotFoundError:
            return None
    folder = resolve_checkpoint(resume)
    if not (folder / MANIFEST).is_file():
        raise UserError(f"--resume {resume}: {folder} has no {MANIFEST}, so it is not a checkpoint of a run")
    return folder


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint {path.parent} is damaged: {path.name} cannot be read ({error})") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_atomically(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text)
    _flush(aside)
    aside.rename(path)
    _flush(path.parent)
