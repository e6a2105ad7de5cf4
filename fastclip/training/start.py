"""What a run is made of, put together and checked before anything is written or trained."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastclip.data import Loader, Tokenizer, get_tokenizer
from fastclip.data.shards import expand_shards
from fastclip.errors import UserError
from fastclip.losses import contrastive_loss
from fastclip.models import CLIP, CLIPConfig, create_model, get_config
from fastclip.training.checkpoint import Checkpoints, Saved, clean, find_checkpoint
from fastclip.training.config import TrainConfig, write_config
from fastclip.training.deepspeed_config import resolve_deepspeed
from fastclip.training.environment import environment
from fastclip.training.processes import Processes


@dataclass(frozen=True)
class Start:
    """A checked run: nothing of it is on disk yet."""

    config: TrainConfig
    run: Path
    model_config: CLIPConfig
    model: CLIP
    tokenizer: Tokenizer
    loader: Loader
    ds_config: dict[str, Any] | None
    conflicts: list[str]
    checkpoints: Checkpoints
    resumed: Saved | None

    def write(self) -> None:
        """The run folder and what describes the run; the first rank's."""
        self.run.mkdir(parents=True, exist_ok=True)
        clean(self.run)
        if self.resumed is None:
            (self.run / "metrics.jsonl").unlink(missing_ok=True)
        write_config(self.config, self.run / "config.yaml")
        self.tokenizer.save(self.run / "tokenizer.json")
        (self.run / "environment.json").write_text(json.dumps(environment(), indent=1))
        if self.ds_config is not None:
            (self.run / "ds_config.json").write_text(json.dumps(self.ds_config, indent=1))

    def describe(self, world_size: int) -> str:
        """What is about to happen, in a line or two."""
        config, loader = self.config, self.loader
        local = config.global_batch // world_size
        chunk = min(config.chunk_size or local, local)
        engine = f"deepspeed ZeRO-{config.zero_stage}" if config.engine == "deepspeed" else config.engine
        lines = [
            f"{loader.num_samples} pairs in {len(loader.index.paths)} shards, {loader.steps_per_epoch} steps an epoch; "
            f"global batch {config.global_batch} = {world_size} ranks x {-(-local // chunk)} chunks of {chunk}; "
            f"{config.model}, {engine}, {config.precision}"
        ]
        lines += [f"{config.deepspeed_config} sets {line}" for line in self.conflicts]
        if self.resumed:
            lines.append(f"Goes on from {self.resumed.folder}")
        return "\n".join(lines)


def prepare(config: TrainConfig, processes: Processes) -> Start:
    """Reads and checks all that `config` names. Raises UserError, the same on every rank, and leaves nothing behind."""
    name = processes.gather(f"runs/{config.model}-{datetime.now():%Y%m%d-%H%M%S}")[0]
    with processes.one_mistake_for_all():
        model_config, tokenizer = _model_and_tokenizer(config)
        loader = Loader(
            config.data,
            tokenizer,
            model_config.vision.image_size,
            config.global_batch,
            processes.rank,
            processes.world_size,
            seed=config.seed,
            workers=config.workers,
            crop_scale=config.crop_scale,
            hard_negatives=config.hard_negatives,
        )
        for package in ["tensorboard"] * config.tensorboard + ["wandb"] * bool(config.wandb):
            if find_spec(package) is None:
                raise UserError(f"--{package} needs the package {package}: pip install {package}")
        if config.val and not Path(config.val).is_dir():
            raise UserError(f"--val {config.val} is not a folder")
        ds_config: dict[str, Any] | None = None
        conflicts: list[str] = []
        if config.engine == "deepspeed":
            config, ds_config, conflicts = resolve_deepspeed(config, processes.world_size)
        run = _writable(Path(config.out or name))
        config = replace(config, out=str(run))
        _check_loss(config, processes.device)
        checkpoints = Checkpoints(
            run, model_config, tokenizer, _identity(config, processes), processes, keep=config.keep
        )
        resumed = _resumed(config, run, checkpoints, loader)
        torch.manual_seed(config.seed)
        model = create_model(model_config, checkpoint=None if resumed else config.init or None)
    return Start(config, run, model_config, model, tokenizer, loader, ds_config, conflicts, checkpoints, resumed)


def _model_and_tokenizer(config: TrainConfig) -> tuple[CLIPConfig, Tokenizer]:
    model = get_config(config.model)
    if not config.data:
        raise UserError("--data is missing: a folder, glob or pattern of training shards")
    expand_shards(config.data)  # before the tokenizer, which is looked for beside them
    folder = Path(config.data) if Path(config.data).is_dir() else Path(config.data).parent
    beside = folder / "tokenizer.json"
    name = config.tokenizer or (str(beside) if beside.is_file() else "ViT-B-32")
    tokenizer = get_tokenizer(name, model.text.context_length)
    if tokenizer.vocab_size > model.text.vocab_size:
        raise UserError(
            f"tokenizer {name} has {tokenizer.vocab_size} tokens, model {config.model} embeds {model.text.vocab_size}"
        )
    return model, tokenizer


def _check_loss(config: TrainConfig, device: torch.device) -> None:
    """Raises if the named implementation cannot run here."""
    if config.loss_impl != "auto":
        features = torch.eye(2, device=device)
        contrastive_loss(features, features, torch.ones((), device=device), impl=config.loss_impl)


def _writable(run: Path) -> Path:
    """`run`, if it is a folder that can be written, or one that can be made."""
    there = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--out {run} cannot be a folder: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {run} cannot be written: {there} is read-only")
    return run


def _identity(config: TrainConfig, processes: Processes) -> dict[str, Any]:
    """What a checkpoint cannot be taken up without: the engine's state is laid out by it."""
    return {
        "engine": config.engine,
        "world_size": processes.world_size,
        "zero_stage": config.zero_stage if config.engine == "deepspeed" else None,
        "precision": config.precision,
        "optimizer": config.optimizer,
    }


def _resumed(config: TrainConfig, run: Path, checkpoints: Checkpoints, loader: Loader) -> Saved | None:
    if not config.resume and any(run.glob("checkpoints/step_*")):
        raise UserError(f"{run} already holds a run: give another --out, or go on with it by --resume latest")
    folder = find_checkpoint(config.resume, run)
    if folder is None:
        return None
    saved = checkpoints.check(folder)
    try:
        loader.load_state_dict(saved.loader)
    except ValueError as error:
        raise UserError(f"checkpoint {folder} is of another run: {error}") from error
    return saved
