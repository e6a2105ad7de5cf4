"""The training loop: shards -> loader -> GradCache over the towers -> contrastive loss -> engine -> metrics, checkpoints."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclip.data import Loader, Tokenizer, get_tokenizer, normalize_image
from fastclip.errors import UserError
from fastclip.grad_cache import GradCache
from fastclip.losses import contrastive_loss
from fastclip.models import CLIPConfig, create_model, get_config
from fastclip.training.checkpoint import Resumed, find_checkpoint, load_checkpoint, save_checkpoint
from fastclip.training.config import TrainConfig, write_config
from fastclip.training.deepspeed_config import deepspeed_config
from fastclip.training.engine import Engine, build_engine
from fastclip.training.environment import environment
from fastclip.training.evaluation import Evaluation
from fastclip.training.metrics import KEYS, Clock, Metrics, total_skips
from fastclip.training.processes import Processes, start_processes, stop_processes
from fastclip.training.schedule import lr_factor


def train(config: TrainConfig) -> Path:
    """Runs `config` to its end, or to the SIGTERM that ends it with a checkpoint; returns the run folder."""
    processes = start_processes()
    try:
        return _train(config, processes)
    finally:
        stop_processes()


def _train(config: TrainConfig, processes: Processes) -> Path:
    model_config, tokenizer = _model_and_tokenizer(config)
    loader = _loader(config, model_config, tokenizer, processes)
    run = _run_folder(config, processes)
    resume_from = find_checkpoint(config.resume, run)
    torch.manual_seed(config.seed)
    model = create_model(model_config, checkpoint=config.init or None)
    ds_config = deepspeed_config(config, processes.world_size) if config.engine == "deepspeed" else None
    if processes.is_first:
        _write_run_files(run, config, ds_config, tokenizer)
    engine = build_engine(model, config, processes, ds_config)
    torch.manual_seed(config.seed + 1 + processes.rank)  # dropout differs between ranks
    identity = {"engine": config.engine, "world_size": processes.world_size, "zero_stage": config.zero_stage}
    identity |= {"precision": config.precision, "optimizer": config.optimizer}
    resumed = Resumed(0, {}, {"elapsed": 0.0, "skipped_steps": 0})
    if resume_from is not None:
        resumed = load_checkpoint(resume_from, engine, processes, model_config, identity)
        loader.load_state_dict(resumed.loader)
    if processes.is_first:
        _say_start(config, processes, loader, resume_from)

    loss_fn = _Loss(config, processes)
    cache = _grad_cache(config, model_config, engine, processes, loss_fn)
    evaluation = Evaluation(config, model_config, tokenizer, engine, processes, run)
    metrics = Metrics(run, config, resumed.step) if processes.is_first else None
    skipped_steps, step, saved_at = resumed.progress["skipped_steps"], resumed.step, -1
    started, clock, stopping = time.monotonic() - resumed.progress["elapsed"], Clock(), False

    def save() -> None:
        progress = {"elapsed": time.monotonic() - started, "skipped_steps": skipped_steps}
        state = loader.state_dict(step)
        tokens = run / "tokenizer.json"
        save_checkpoint(
            run, step, engine, processes, model_config, tokens, state, progress, identity, keep=config.keep
        )

    batches = loader.batches(resumed.step)
    with _termination() as terminated:
        while True:
            elapsed, terminate = processes.agree(time.monotonic() - started, float(terminated()))
            progress = max(step / config.steps, elapsed / (60 * config.minutes) if config.minutes else 0.0)
            stopping = bool(terminate)
            if stopping or progress >= 1:
                break
            waiting = time.perf_counter()
            batch = next(batches)
            clock.waited += time.perf_counter() - waiting
            loss = cache.step({"clip": (batch["image"], batch["text"])})
            factor = lr_factor(config.schedule, step, config.warmup, progress)
            result = engine.step(factor)
            step, skipped_steps = step + 1, skipped_steps + result.skipped
            clock.steps += 1
            if metrics:
                metrics.bar.update()
            if step % config.log_every == 0:
                skips = total_skips(loader.skipped, processes)
                if metrics:
                    values = {
                        "step": step,
                        "epoch": batch["epoch"],
                        "samples": step * config.global_batch,
                        "loss": loss.item(),
                        "logit_scale": loss_fn.logit_scale.item(),
                        "lr": config.lr * factor,
                        "grad_norm": result.grad_norm,
                        "elapsed": elapsed,
                        "skipped_steps": skipped_steps,
                        "skipped_samples": skips,
                    }
                    values |= clock.read(config.global_batch)
                    metrics.write({key: values[key] for key in KEYS})
            if config.save_every and step % config.save_every == 0:
                save()
                saved_at = step
            if config.eval_every and step % config.eval_every == 0:
                evaluation.run(step)
    batches.close()
    if metrics:
        metrics.close()
    if saved_at != step:
        save()
    if not stopping:
        evaluation.run(step, final=True)
    if processes.is_first:
        from fastclip.report import write_report

        report = write_report(run)
        print(f"{'Stopped' if stopping else 'Done'} after {step} steps. Report: {report}")
    return run


def _model_and_tokenizer(config: TrainConfig) -> tuple[CLIPConfig, Tokenizer]:
    model = get_config(config.model)
    if not config.data:
        raise UserError("--data is missing: a folder, glob or pattern of training shards")
    folder = Path(config.data) if Path(config.data).is_dir() else Path(config.data).parent
    beside = folder / "tokenizer.json"
    name = config.tokenizer or (str(beside) if beside.is_file() else "ViT-B-32")
    tokenizer = get_tokenizer(name, model.text.context_length)
    if tokenizer.vocab_size > model.text.vocab_size:
        raise UserError(
            f"tokenizer {name} has {tokenizer.vocab_size} tokens, model {config.model} embeds {model.text.vocab_size}"
        )
    return model, tokenizer


def _loader(config: TrainConfig, model: CLIPConfig, tokenizer: Tokenizer, processes: Processes) -> Loader:
    return Loader(
        config.data,
        tokenizer,
        model.vision.image_size,
        config.global_batch,
        processes.rank,
        processes.world_size,
        seed=config.seed,
        workers=config.workers,
        crop_scale=config.crop_scale,
    )


def _run_folder(config: TrainConfig, processes: Processes) -> Path:
    """The run's folder; a new run never writes over another's checkpoints."""
    name = processes.gather(f"runs/{config.model}-{datetime.now():%Y%m%d-%H%M%S}")[0]
    run = Path(config.out or name)
    if not config.resume and any(run.glob("checkpoints/step_*")):
        raise UserError(f"{run} already holds a run: give another --out, or go on with it by --resume latest")
    processes.barrier()
    if processes.is_first:
        run.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            (run / "metrics.jsonl").unlink(missing_ok=True)
    return run


def _write_run_files(run: Path, config: TrainConfig, ds_config: dict[str, Any] | None, tokenizer: Tokenizer) -> None:
    write_config(config, run / "config.yaml")
    tokenizer.save(run / "tokenizer.json")
    (run / "environment.json").write_text(json.dumps(environment(), indent=1))
    if ds_config is not None:
        (run / "ds_config.json").write_text(json.dumps(ds_config, indent=1))


def _say_start(config: TrainConfig, processes: Processes, loader: Loader, resume_from: Path | None) -> None:
    local = config.global_batch // processes.world_size
    chunk = config.chunk_size or local
    print(
        f"{loader.num_samples} pairs in {len(loader.index.paths)} shards, {loader.steps_per_epoch} steps an epoch; "
        f"global batch {config.global_batch} = {processes.world_size} ranks x {-(-local // chunk)} chunks of "
        f"{min(chunk, local)}; {config.model}, {config.engine}"
        + (f" ZeRO-{config.zero_stage}" if config.engine == "deepspeed" else "")
        + f", {config.precision}"
        + (f"; goes on from {resume_from}" if resume_from else ""),
        flush=True,
    )


class _Loss:
    """The contrastive loss over all ranks, remembering the scale it saw."""

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self.loss = partial(contrastive_loss, group=processes.group, impl=config.loss_impl)
        self.logit_scale = torch.tensor(float("nan"))

    def __call__(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        self.logit_scale = logit_scale.detach()
        return self.loss(image_features, text_features, logit_scale)


def _grad_cache(
    config: TrainConfig, model: CLIPConfig, engine: Engine, processes: Processes, loss: _Loss
) -> GradCache:
    def clip(image: Tensor, text: Tensor) -> dict[str, Tensor]:
        image = image.to(processes.device, non_blocking=True)
        pixels = normalize_image(image, model.image_mean, model.image_std, engine.dtype)
        return engine.forward(pixels, text.to(processes.device, non_blocking=True))

    chunk_size = config.chunk_size or config.global_batch // processes.world_size
    return GradCache({"clip": clip}, loss, chunk_size, processes.group, engine.backward, engine.set_boundary)


@contextmanager
def _termination() -> Iterator[Any]:
    """A function that says whether SIGTERM or SIGUSR1 has come; both then only ask the loop to save and end."""
    seen: list[int] = []
    signals = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda received, _: seen.append(received)) for number in signals]
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
