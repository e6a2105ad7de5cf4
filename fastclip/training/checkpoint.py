"""Checkpoints that are whole or not there: written aside, hashed, flushed to disk, renamed, and only then named latest.

runs/x/latest                                   the name of the newest step folder
runs/x/ema                                      a link to its ema/
runs/x/checkpoints/step_00000500/manifest.json  what the folder holds, with the sha256 of every file
                                 model.safetensors, open_clip_config.json, tokenizer.json: a model to use anywhere
                                 data.json      where the loader and the run stood
                                 ema/           the moving average of the weights, a model like the one above
                                 state/         what the engine, and a loss with a memory, needs to go on, bit for bit
                                 optimizer.safetensors   the same of its optimizer by parameter name, for other layouts
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclip.data import Tokenizer
from fastclip.errors import UserError, in_a_line
from fastclip.losses.normalisers import Normalisers
from fastclip.models import resolve_checkpoint
from fastclip.models.checkpoint import LATEST, STEPS, WEIGHTS, save_model
from fastclip.models.config import CLIPConfig
from fastclip.training.engine import Engine
from fastclip.training.mapped import read_mapped
from fastclip.training.mirror import Mirror
from fastclip.training.open_clip import read_checkpoint
from fastclip.training.processes import Processes
from fastclip.training.step_folder import (
    MANIFEST,
    WRITING,
    clean,
    flush,
    link,
    read_json,
    remove,
    sha256,
    write_atomically,
    write_manifest,
)

DATA, STATE, MOMENTS, EMA = "data.json", "state", "optimizer.safetensors", "ema"
AVERAGE = "ema.pt"  # in a snapshot
SETTLE = 20.0  # seconds; launchers kill what has not ended within 30
LAYOUT = ("engine", "world_size", "zero_stage")  # of `identity`: what a portable checkpoint may be taken up without


class NotSaved(UserError):
    """A checkpoint could not be written (the disk is full, say); the ones before are as they were."""


@dataclass(frozen=True)
class Saved:
    """A step folder's record: `identity` is what must be the same to go on (engine, world size, ZeRO stage, ...).

    moved: what of the layout differs, so that the run goes on from the portable part, "world_size 2 -> 1".
    """

    folder: Path
    step: int
    identity: dict[str, Any]
    loader: dict[str, Any]
    progress: dict[str, Any]
    moved: str = ""
    is_snapshot: bool = False  # the engine's state alone: see `fastclip.training.snapshots`


class Checkpoints:
    """The step folders of a run; every rank makes one and calls its methods together."""

    def __init__(
        self,
        run: Path,
        model: CLIPConfig,
        tokenizer: Tokenizer,
        identity: dict[str, Any],
        processes: Processes,
        keep: int,
        is_portable: bool = True,
        in_background: bool = False,
        mirror: Mirror | None = None,
    ) -> None:
        self.run, self.model, self.tokenizer, self.identity = run, model, tokenizer, identity
        self.processes, self.keep = processes, keep
        self.is_portable, self.in_background, self.mirror = is_portable, in_background, mirror
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save(
        self,
        step: int,
        engine: Engine,
        loader: dict[str, Any],
        progress: dict[str, Any],
        average: Mapping[str, Tensor] | None = None,
        normalisers: Tensor | None = None,
    ) -> Path:
        """Writes the folder of `step`, which is safe on disk when this returns, or in the background when `wait` does.

        average: the first rank's moving average of the weights, if the run keeps one.
        normalisers: this rank's part of them, if the loss has any.
        Raises NotSaved on every rank if one cannot write, or could not the last time.
        """
        self.wait()
        steps = self.run / STEPS
        final, aside = steps / f"step_{step:08d}", steps / f"{WRITING}{step:08d}"
        with self._failing_together():
            if self.processes.is_first:
                clean(self.run)
                (aside / STATE).mkdir(parents=True)
        with self._failing_together():
            engine.save_state(aside / STATE)
            torch.save(random_states(), aside / STATE / f"random_{self.processes.rank}.pt")
            if normalisers is not None:
                torch.save(normalisers.cpu().clone(), normalisers_file(aside, self.processes.rank))
        weights = engine.full_state_dict()
        moments = engine.optimizer_state() if self.is_portable else None
        models = {"": weights} | ({EMA: {k: v.clone() for k, v in average.items()}} if average else {})
        data = json.dumps({"loader": loader, "progress": progress})
        if self.processes.is_first:
            self._writing = self._writer.submit(self._complete, step, aside, final, models, moments, data)
        if not self.in_background:
            self.wait()
        return final

    def wait(self) -> None:
        """Returns when the last save is safe on disk. Raises NotSaved on every rank if it failed."""
        with self._failing_together():
            try:
                if self._writing:
                    self._writing.result()
            finally:
                self._writing = None

    def settle(self) -> None:
        """For a process about to end, others having died: waits for what this rank alone writes, not for ever."""
        if self._writing:
            wait([self._writing], timeout=SETTLE)

    def finish(self) -> None:
        """Returns when the last save is safe on disk, and in the mirror if there is one (or it has said why not)."""
        self.wait()
        newest = find_checkpoint("latest", self.run)
        if self.mirror and newest:
            self.mirror.finish(newest)

    def _complete(
        self,
        step: int,
        aside: Path,
        final: Path,
        models: dict[str, dict[str, Tensor]],
        moments: dict[str, Tensor] | None,
        data: str,
    ) -> None:
        """The first rank's part, which needs no other rank any more."""
        from safetensors.torch import save_file

        for name, weights in models.items():
            (aside / name).mkdir(exist_ok=True)
            save_model(aside / name, weights, self.model)
            self.tokenizer.save(aside / name / "tokenizer.json")
        if moments is not None:
            save_file(moments, aside / MOMENTS)
        (aside / DATA).write_text(data)
        write_manifest(aside, step, self.identity)
        remove(final)
        aside.rename(final)
        flush(final.parent)
        write_atomically(self.run / LATEST, f"{final.name}\n")
        if EMA in models:
            link(self.run / EMA, final / EMA)
        # Of a run that went back to an earlier step the later folders stay, until it reaches them.
        for old in sorted(path for path in final.parent.glob("step_*") if path.name <= final.name)[: -self.keep]:
            remove(old)
        if self.mirror:
            self.mirror.push(final)

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Whatever keeps one rank from writing inside is raised on every rank, once all have come so far."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # OSError, and what torch and safetensors make of one
            failure = error
        said = [one for one in self.processes.gather(None if failure is None else in_a_line(failure)) if one]
        if said:
            if self.processes.is_first:
                clean(self.run)
            raise NotSaved(f"a checkpoint in {self.run} could not be written: {said[0]}") from failure

    def check(self, folder: Path) -> Saved:
        """The record of `folder` if this run can go on from it; waits for no other rank.

        Raises UserError naming what differs: another model, engine, world size, stage or precision, or a damaged file.
        """
        manifest = read_json(folder / MANIFEST)
        try:
            step, identity, files = manifest["step"], manifest["identity"], manifest["files"]
            sizes = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"checkpoint {folder} is damaged: {MANIFEST} lacks {error}") from error
        for name, (size, digest) in sizes.items():
            path = folder / name
            if not path.is_file():
                raise UserError(f"checkpoint {folder} is incomplete: {name} is missing")
            if path.stat().st_size != size or (self.processes.is_first and sha256(path) != digest):
                raise UserError(f"checkpoint {folder} is damaged: {name} is not what its manifest says")
        saved_model = CLIPConfig.from_dict(read_json(folder / "open_clip_config.json"))
        if saved_model != self.model:
            changed = ", ".join(_differences(saved_model, self.model))
            raise UserError(f"checkpoint {folder} holds another architecture than --model: {changed}")
        moved = []
        for key, value in self.identity.items():
            if identity.get(key) != value:
                if key not in LAYOUT or MOMENTS not in files:
                    written = f"checkpoint {folder} was written with {key} = {identity.get(key)}"
                    why = f" and holds no {MOMENTS} (--portable; not for Muon at ZeRO-1 and 2)" if key in LAYOUT else ""
                    raise UserError(f"{written}{why}; this run has {key} = {value}")
                moved.append(f"{key} {identity.get(key)} -> {value}")
        data = read_json(folder / DATA)
        return Saved(folder, step, identity, data["loader"], data["progress"], ", ".join(moved))

    def average(self, saved: Saved) -> dict[str, Tensor] | None:
        """The moving average of the weights that `saved` holds, if it does."""
        from safetensors.torch import load_file

        if saved.is_snapshot:
            path = saved.folder / AVERAGE
            return read_mapped(path, weights_only=True) if path.is_file() else None
        path = saved.folder / EMA / WEIGHTS
        return load_file(path) if path.is_file() else None

    def load(self, saved: Saved, engine: Engine) -> None:
        """Puts the engine and the random generators back where `saved` left them.

        In another layout the weights, the optimizer and the data go on; random numbers begin anew, as does the scale of
        an fp16 loss.
        """
        if saved.moved:
            from safetensors.torch import load_file

            if saved.folder.is_file():
                weights, moments, _ = read_checkpoint(saved.folder)
            else:
                weights, moments = load_file(saved.folder / WEIGHTS), load_file(saved.folder / MOMENTS)
            engine.load_portable(weights, moments)
            return
        read = read_mapped if saved.is_snapshot else torch.load
        engine.load_state(saved.folder / STATE, read)
        random = read(saved.folder / STATE / f"random_{self.processes.rank}.pt", weights_only=True)
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])

    def load_normalisers(self, saved: Saved, normalisers: Normalisers) -> None:
        """Puts this rank's part back, from those of all ranks of `saved`; there may have been another number of them.

        Raises UserError where it has none, of a run without that loss.
        """
        own = normalisers_file(saved.folder, self.processes.rank)
        if own.is_file() and not saved.moved:
            read = read_mapped if saved.is_snapshot else torch.load
            normalisers.load_own(read(own, weights_only=True))
            return
        count = len(list((saved.folder / STATE).glob(normalisers_file(saved.folder, "*").name)))
        if not count:
            raise UserError(f"checkpoint {saved.folder} is of a run without --global-weight, which needs a new run")
        files = (normalisers_file(saved.folder, rank) for rank in range(count))
        normalisers.load_parts([torch.load(file, weights_only=True, mmap=True) for file in files])


def normalisers_file(folder: Path, rank: int | str) -> Path:
    """Where a step folder or a snapshot has a rank's part."""
    return folder / STATE / f"normalisers_{rank}.pt"


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


def _differences(saved: Any, wanted: Any, where: str = "") -> list[str]:
    """`field: saved, not wanted` for every field in which two configs differ."""
    lines = []
    for field in fields(saved):
        a, b = getattr(saved, field.name), getattr(wanted, field.name)
        if type(a) is type(b) and hasattr(a, "__dataclass_fields__"):
            lines += _differences(a, b, f"{where}{field.name}.")
        elif a != b:
            lines.append(f"{where}{field.name} is {a}, not {b}")
    return lines


def random_states() -> dict[str, torch.Tensor]:
    """Of this process's generators."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
