"""What a run is made of, put together and checked before anything is written or trained."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from fastclip.data import Loader, Tokenizer, get_tokenizer
from fastclip.data.augment import ColorAugment, RandomErase
from fastclip.data.nvjpeg import nvjpeg_decoder
from fastclip.data.options import DataOptions
from fastclip.data.scan import IMAGE_SUFFIXES
from fastclip.data.shards import expand_shards
from fastclip.errors import UserError
from fastclip.losses import contrastive_loss
from fastclip.models import CLIP, CLIPConfig, create_model
from fastclip.models.compiled import compile_blocks
from fastclip.models.fp8 import use_fp8
from fastclip.training.checkpoint import Checkpoints, Saved, find_checkpoint
from fastclip.training.config import TrainConfig, write_config
from fastclip.training.deepspeed_config import resolve_deepspeed
from fastclip.training.engine import computes_in_bf16
from fastclip.training.environment import environment
from fastclip.training.fit import fit
from fastclip.training.mirror import Mirror
from fastclip.training.model import model_of, model_without_memory
from fastclip.training.open_clip import is_open_clip_checkpoint, read_checkpoint
from fastclip.training.processes import Processes
from fastclip.training.snapshots import Snapshots
from fastclip.training.step_folder import clean

TEACHER = ("teacher_image", "teacher_text")  # features stored beside the samples


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
    notes: list[str]  # what was chosen for the user, and what the user's files change
    checkpoints: Checkpoints
    snapshots: Snapshots
    resumed: Saved | None

    def write(self) -> None:
        """The run folder and what describes the run; the first rank's."""
        self.run.mkdir(parents=True, exist_ok=True)
        clean(self.run)
        if self.resumed is None or not self.resumed.is_snapshot:
            self.snapshots.remove()
        if self.resumed is None:
            (self.run / "metrics.jsonl").unlink(missing_ok=True)
        write_config(self.config, self.run / "config.yaml")
        self.tokenizer.save(self.run / "tokenizer.json")
        (self.run / "environment.json").write_text(json.dumps(environment(), indent=1))
        if self.ds_config is not None:
            (self.run / "ds_config.json").write_text(json.dumps(self.ds_config, indent=1))

    def describe(self, world_size: int, reduction: str) -> str:
        """What is about to happen, in a line or two."""
        config = self.config
        local = config.global_batch // world_size
        chunk = min(config.chunk_size or local, local)
        engine = f"deepspeed ZeRO-{config.zero_stage}" if config.engine == "deepspeed" else config.engine
        lines = [
            self.loader.describe(),
            f"global batch {config.global_batch} = {world_size} ranks x {-(-local // chunk)} chunks of {chunk}; "
            f"{config.model}, {engine}, {config.precision}, gradients reduced by {reduction}",
        ]
        lines += self.notes
        if self.resumed:
            moved = f", moved by parameter name ({self.resumed.moved})" if self.resumed.moved else ""
            lines.append(f"Goes on from {self.resumed.folder}{moved}")
        return "\n".join(lines)


def prepare(config: TrainConfig, processes: Processes) -> Start:
    """Reads and checks all that `config` names. Raises UserError, the same on every rank, and leaves nothing behind."""
    name = processes.gather(f"runs/{config.model}-{datetime.now():%Y%m%d-%H%M%S}")[0]
    config, notes = _with_precision(config, processes)
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
            hard_negatives=config.hard_negatives,
            options=_data_options(config, model_config, processes.device),
        )
    if config.fit:
        config, chosen = fit(config, processes)
        notes.append(chosen)
    with processes.one_mistake_for_all():
        run = _writable(Path(config.out or name))
        mirror = Mirror(config.mirror, run, config.keep) if config.mirror and processes.is_first else None
        if mirror and config.resume == "latest":
            mirror.pull()
    with processes.one_mistake_for_all():
        for package in ["tensorboard"] * config.tensorboard + ["wandb"] * bool(config.wandb):
            if find_spec(package) is None:
                raise UserError(f"--{package} needs the package {package}: pip install {package}")
        if config.val and not Path(config.val).is_dir():
            raise UserError(f"--val {config.val} is not a folder")
        ds_config: dict[str, Any] | None = None
        if config.engine == "deepspeed":
            config, ds_config, conflicts = resolve_deepspeed(config, processes.world_size)
            notes += [f"{config.deepspeed_config} sets {line}" for line in conflicts]
        config = replace(config, out=str(run))
        _check_loss(config, processes.device)
    identity = _identity(config, processes)
    snapshots = Snapshots(run, model_config, identity, processes)
    snapshot = snapshots.newest() if config.resume == "latest" else None
    if config.resume == "latest" and snapshot is None and snapshots.are_there():
        notes.append("The snapshots are left out: of other settings (ranks, stage, model ...), or of before this boot")
    with processes.one_mistake_for_all():
        checkpoints = Checkpoints(
            run,
            model_config,
            tokenizer,
            identity,
            processes,
            keep=config.keep,
            is_portable=config.portable and not has_flat_momentum(config),
            in_background=config.background_save,
            mirror=mirror,
        )
        resumed = _resumed(config, run, checkpoints, snapshot, loader)
        torch.manual_seed(config.seed)
        moved_from = resumed.folder if resumed and resumed.moved else None
        source = moved_from if resumed else config.init or None
        waits = _waits_for_weights(config, model_config, processes)
        model = model_without_memory(model_config) if waits else create_model(model_config, checkpoint=source)
        model.set_recompute(config.recompute)
        if config.fp8:
            with _told_of("--fp8"):
                use_fp8(model, device=processes.device)
        if config.compile:
            with _told_of("--compile"):
                compile_blocks(model)
    _check_same_data(loader, processes)
    return Start(config, run, model_config, model, tokenizer, loader, ds_config, notes, checkpoints, snapshots, resumed)


def _waits_for_weights(config: TrainConfig, model: CLIPConfig, processes: Processes) -> bool:
    """Whether this rank is given its part of one weight after another by the first rank, and never has the whole model.

    Wrapped towers make theirs as they are made, and fp8 products are made of products that are there.
    """
    is_partitioned = config.engine == "deepspeed" and config.zero_stage == 3 and not config.fp8
    return is_partitioned and not processes.is_first and not (model.vision.is_wrapped or model.text.is_wrapped)


def _with_precision(config: TrainConfig, processes: Processes) -> tuple[TrainConfig, list[str]]:
    """The config with its precision settled, the same on every rank, and what the user should know of it."""
    if config.precision not in ("auto", "bf16"):
        return config, []
    is_slow = bool(processes.agree(not computes_in_bf16(processes.device))[0])
    slow = f"{processes.device.type} has no bf16 products"
    if config.precision == "bf16":
        return config, [f"{slow}: this will be far slower than --precision fp32"] * is_slow
    precision: Literal["fp32", "bf16"] = "fp32" if is_slow else "bf16"
    return replace(config, precision=precision), [f"{slow}: computes in fp32"] * is_slow


def _model_and_tokenizer(config: TrainConfig) -> tuple[CLIPConfig, Tokenizer]:
    model = model_of(config)
    if model.decoder is None and config.caption_weight:
        raise UserError(f"model {config.model} has no decoder for caption_weight to train: take coca_ViT-B-32, say")
    if model.decoder is not None and not config.caption_weight:
        raise UserError(f"model {config.model} has a decoder, which nothing trains: give caption_weight (CoCa's is 2)")
    if not config.data:
        raise UserError("--data is missing: a folder, glob or pattern of training shards")
    _check_shards(config.data)  # before the tokenizer, which is looked for beside them
    folder = Path(config.data) if Path(config.data).is_dir() else Path(config.data).parent
    beside = folder / "tokenizer.json"
    name = config.tokenizer or (str(beside) if beside.is_file() else "ViT-B-32")
    tokenizer = get_tokenizer(name, model.text.context_length)
    if tokenizer.vocab_size > model.text.vocab_size:
        raise UserError(
            f"tokenizer {name} has {tokenizer.vocab_size} tokens, model {config.model} embeds {model.text.vocab_size}"
        )
    return model, tokenizer


def _check_shards(data: str) -> None:
    """Raises if there are none; data of other kinds says itself what it lacks."""
    path = Path(data)
    is_other = "::" in data or ":" in data or path.suffix in (".csv", ".tsv", ".parquet", ".json")
    is_images = path.is_dir() and not any(path.glob("*.tar")) and any(map(_is_image, path.rglob("*")))
    if not (is_other or is_images):
        expand_shards(data)


def has_flat_momentum(config: TrainConfig) -> bool:
    """Whether DeepSpeed keeps Muon's momentum in a layout of its own, by rank and not by parameter."""
    return config.optimizer == "muon" and config.engine == "deepspeed" and config.zero_stage in (1, 2)


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES


def _data_options(config: TrainConfig, model: CLIPConfig, device: torch.device) -> DataOptions:
    try:
        upsampling = tuple(float(factor) for factor in config.upsampling.split("::") if factor)
    except ValueError:
        raise UserError(f"upsampling must be numbers like 1::0.5, was {config.upsampling!r}") from None
    return DataOptions(
        upsampling=upsampling,
        resampled=config.resampled,
        text_keys=config.text_keys,
        image_key=config.image_key,
        caption_key=config.caption_key,
        crop_scale=config.crop_scale,
        color=ColorAugment(config.color_jitter, config.color_jitter_prob, config.gray_scale_prob),
        crop_ratio=config.crop_ratio,
        erase=RandomErase(config.erase_prob, config.erase_count, model.image_mean, model.image_std),
        fast_decode=config.fast_decode,
        decoder=nvjpeg_decoder(device) if config.gpu_decode else None,
        strict=config.strict,
        max_broken=config.max_broken,
        arrays=tuple(f"{name}.npy" for name in TEACHER) if config.distill_weight else (),
    )


def _check_loss(config: TrainConfig, device: torch.device) -> None:
    """Raises if the named implementation cannot run here."""
    if config.loss_impl != "auto":
        features = torch.eye(2, device=device)
        contrastive_loss(features, features, torch.ones((), device=device), impl=config.loss_impl)


def _check_same_data(loader: Loader, processes: Processes) -> None:
    """Raises, on every rank, where ranks list other data: they would not meet at the same step."""
    found = processes.gather((loader.fingerprint(), loader.num_samples))
    other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        raise UserError(
            f"--data is not the same everywhere: rank 0 lists {found[0][1]:,} pairs, rank {other} {found[other][1]:,}, "
            "or in other shards: give all machines the same files"
        )


@contextmanager
def _told_of(option: str) -> Iterator[None]:
    """The reason why it cannot be had is a user's mistake."""
    try:
        yield
    except (ImportError, ValueError) as error:
        raise UserError(f"{option}: {error}") from error


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


def _resumed(
    config: TrainConfig, run: Path, checkpoints: Checkpoints, snapshot: Saved | None, loader: Loader
) -> Saved | None:
    if not config.resume and any(run.glob("checkpoints/step_*")):
        raise UserError(f"{run} already holds a run: give another --out, or go on with it by --resume latest")
    if is_open_clip_checkpoint(config.resume):
        path = Path(config.resume)
        return Saved(
            path, read_checkpoint(path)[2], {}, {}, {"elapsed": 0.0, "skipped_steps": 0}, "open_clip's trainer"
        )
    folder = find_checkpoint(config.resume, run)
    if snapshot and (folder is None or folder.name < f"step_{snapshot.step:08d}"):
        saved = snapshot
    elif folder:
        saved = checkpoints.check(folder)
    else:
        return None
    try:
        loader.load_state_dict(saved.loader)
    except ValueError as error:
        raise UserError(f"checkpoint {saved.folder} is of another run: {error}") from error
    return saved
