"""The training loop: shards -> loader -> GradCache over the towers -> contrastive loss -> engine -> metrics, saving."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclip.data import normalize_image
from fastclip.data.loader import Batch
from fastclip.grad_cache import GradCache
from fastclip.models import CLIPConfig
from fastclip.training.allocator import give_back_memory
from fastclip.training.average import WeightAverage
from fastclip.training.checkpoint import NotSaved, find_checkpoint
from fastclip.training.config import TrainConfig
from fastclip.training.engine import Engine, StepResult, build_engine
from fastclip.training.evaluation import Evaluation
from fastclip.training.loss import Loss
from fastclip.training.metrics import KEYS, Clock, Metrics, in_words, of_all_ranks, over_ranks
from fastclip.training.processes import Processes
from fastclip.training.quarantine import Quarantine
from fastclip.training.schedule import lr_factor
from fastclip.training.signals import GO_ON, INTERRUPT, Request, requests_to_end
from fastclip.training.spikes import Spikes
from fastclip.training.start import TEACHER, Start, prepare
from fastclip.training.watchdog import Watchdog, watched

STEPS_BETWEEN_TRIMS = 50


def train(config: TrainConfig, processes: Processes, request: Request | None = None) -> Path:
    """Runs `config` to its end, or to the signal that ends it with a checkpoint; returns the run folder.

    request: of a caller that listens to signals already. Raises UserError on every rank for a user's mistake, and
    KeyboardInterrupt after Ctrl-C, once the state is saved.
    """
    with (
        nullcontext(request) if request else requests_to_end() as request,
        watched(processes, config.hang_timeout, request) as watchdog,
    ):
        start = prepare(config, processes)
        trainer = Trainer(start, processes, watchdog)
        asked = trainer.run(request)
        trainer.finish(asked)
    if asked == INTERRUPT:
        raise KeyboardInterrupt
    return start.run


class Trainer:
    """A run under way, of which `step` optimizer steps are done."""

    def __init__(self, start: Start, processes: Processes, watchdog: Watchdog) -> None:
        self.start, self.config, self.processes, self.watchdog = start, start.config, processes, watchdog
        watchdog.before_end = start.checkpoints.settle
        self.engine = build_engine(start.model, self.config, processes, start.ds_config)
        torch.manual_seed(self.config.seed + 1 + processes.rank)  # dropout differs between ranks
        self.step, self.saved_at, self.skipped_steps, elapsed = 0, -1, 0, 0.0
        if start.resumed:
            start.checkpoints.load(start.resumed, self.engine)
            self.step = start.resumed.step
            self.saved_at = -1 if start.resumed.is_snapshot else self.step
            self.skipped_steps, elapsed = (start.resumed.progress[key] for key in ("skipped_steps", "elapsed"))
        self.average: WeightAverage | None = None
        if self.config.ema:
            begun = start.checkpoints.average(start.resumed) if start.resumed else None
            self.average = WeightAverage(self.config.ema, self.config.ema_every, self.engine, processes, begun)
        self.loss = Loss(self.config, processes, start.loader.data_size)
        if start.resumed and self.loss.normalisers:
            start.checkpoints.load_normalisers(start.resumed, self.loss.normalisers)
        self.grad_cache = build_grad_cache(self.config, start.model_config, self.engine, processes, self.loss)
        self.metrics: Metrics | None = None
        if processes.is_first:
            start.write()
            print(start.describe(processes.world_size, self.engine.reduction), flush=True)
            self.metrics = Metrics(start.run, self.config, self.step)
        self.evaluation = Evaluation(
            self.config, start.model_config, start.tokenizer, self.engine, processes, start.run
        )
        self.clock = Clock(elapsed)
        self.quarantine = Quarantine(start.run, processes, self.config.max_skipped)
        self.spikes = Spikes(self.config.spike) if self.config.spike else None

    def run(self, request: Request) -> int:
        """Steps until the run is done, or until some rank has been asked to end; returns what was asked for."""
        config, loader, first = self.config, self.start.loader, self.step
        with closing(loader.batches(self.step)) as batches:
            while True:
                skipped, seen = Counter(loader.skipped), Counter(loader.seen)
                has_begun = self.step > first
                self.watchdog.at(f"the batch of step {self.step + 1}", has_begun)
                batch, mistake = self._next(batches)
                elapsed, asked, failed = self.processes.agree(self.clock.elapsed(), request.value, mistake is not None)
                progress = max(self.step / config.steps, elapsed / (60 * config.minutes) if config.minutes else 0.0)
                if asked != GO_ON or progress >= 1:
                    loader.skipped, loader.seen = skipped, seen  # the last batch is not trained on
                    return int(asked)
                if failed:
                    self.processes.raise_together(mistake)
                self.watchdog.at(f"step {self.step + 1}", has_begun)
                factor = lr_factor(config.schedule, self.step, config.warmup, progress, config.cooldown, config.steps)
                inputs = {name: batch[name] for name in ("image", "text", "negative_text") if name in batch}
                names = (*TEACHER, "index") if self.loss.normalisers else TEACHER
                beside = {name: batch[name].to(self.processes.device) for name in names if name in batch}
                self.loss.begin(batch["epoch"])
                loss = self.grad_cache.step({"clip": inputs}, **beside)
                result = self.engine.step(factor)
                self.step += 1
                self.skipped_steps += result.skipped
                if self.average:
                    self.average.look(self.step)
                self.quarantine.look(result.skipped)
                # A step that only the scale of an fp16 loss was too large for says nothing of its samples.
                if result.skipped and (config.precision != "fp16" or not loss.isfinite()):
                    is_finite = bool(self.loss.is_finite)
                    self.quarantine.record(self.step, float(loss), result.grad_norm, batch["keys"], is_finite)
                if self.spikes and self.processes.agree(self.spikes.look(float(loss)))[0]:
                    self._roll_back(float(loss), result.grad_norm, batch["keys"])
                self._log(batch["epoch"], loss, factor, result, elapsed)
                if self.quarantine.is_full:
                    self._save()
                    self.start.checkpoints.finish()
                    raise self.quarantine.error()
                if self.step % STEPS_BETWEEN_TRIMS == 0:
                    give_back_memory()
                if config.save_every and self.step % config.save_every == 0:
                    self._or_go_on(self._save)
                elif config.snapshot_every and self.step % config.snapshot_every == 0:
                    self._or_go_on(self._snapshot)
                if config.eval_every and self.step % config.eval_every == 0 and self.step < config.steps:
                    self.watchdog.at(f"the evaluation behind step {self.step}", is_limited=False)
                    with self.clock.stopped():
                        self.evaluation.run(self.step)

    def finish(self, asked: int) -> None:
        """The last checkpoint, and for a run that came to its end the last evaluation; the report."""
        if self.saved_at != self.step:
            self._save()
        self.start.checkpoints.wait()
        self.watchdog.at("the end", is_limited=False)
        if asked == GO_ON:
            self.evaluation.run(self.step, final=True)
        skipped = over_ranks(self.start.loader.skipped, self.processes)
        if self.metrics:
            from fastclip.report import write_report

            self.metrics.close()
            report = write_report(self.start.run)
            if skipped:
                print(f"Samples skipped or changed: {in_words(skipped)}")
            if self.skipped_steps:
                print(f"Steps skipped for a gradient that was not finite: {self.skipped_steps}")
            end = f"{self.step} steps done."
            if asked != GO_ON:
                end = f"Stopped after {self.step} steps and saved; --resume latest --out {self.start.run} goes on."
            print(f"{end} Report: {report}", flush=True)
        self.start.checkpoints.finish()
        if self.metrics:
            self.start.snapshots.remove()
        self.processes.barrier()

    def _next(self, batches: Iterator[Batch]) -> tuple[Batch, Exception | None]:
        """The next batch, or the mistake in the data that leaves none."""
        waiting = time.perf_counter()
        try:
            return next(batches), None
        except (ValueError, OSError) as mistake:
            return {}, mistake
        finally:
            self.clock.waited += time.perf_counter() - waiting

    def _roll_back(self, loss: float, grad_norm: float, keys: list[str]) -> None:
        """Weights, optimizer and the loss's memory of the last checkpoint; data and schedule go on behind the spike."""
        self.watchdog.at(f"the way back from step {self.step}", is_limited=False)
        self.quarantine.record(self.step, loss, grad_norm, keys, is_finite=True)
        self.start.checkpoints.wait()
        with self.processes.one_mistake_for_all():
            folder = find_checkpoint("latest", self.start.run)
            saved = self.start.checkpoints.check(folder) if folder else None
        if saved:
            self.start.checkpoints.load(saved, self.engine)
            if self.loss.normalisers:
                self.start.checkpoints.load_normalisers(saved, self.loss.normalisers)
            if self.average:
                self.average.restart(self.start.checkpoints.average(saved))
        if self.processes.is_first:
            done = f"back to the weights of {folder.name}" if folder else "no checkpoint to go back to"
            print(f"\nstep {self.step}: loss {loss:.4g} is a spike; {done}", flush=True)

    def _log(self, epoch: int, loss: Tensor, factor: float, result: StepResult, elapsed: float) -> None:
        self.clock.steps += 1
        if self.step % self.config.log_every == 0:
            skipped_samples = over_ranks(self.start.loader.skipped, self.processes)
            seen = self.start.loader.seen
            source_samples = over_ranks(seen, self.processes) if len(self.start.loader.sources) > 1 else {}
            if self.metrics:
                values = {
                    "step": self.step,
                    "epoch": epoch,
                    "samples": self.step * self.config.global_batch,
                    "loss": loss.item(),
                    "logit_scale": self.loss.logit_scale.item(),
                    "lr": self.config.lr * factor,
                    "grad_norm": result.grad_norm,
                    "elapsed": elapsed,
                    "skipped_steps": self.skipped_steps,
                    "skipped_samples": skipped_samples,
                    "source_samples": source_samples,
                    **self.clock.read(self.config.global_batch),
                }
                self.metrics.write({key: values[key] for key in KEYS})
        if self.metrics:
            self.metrics.show(self.step, elapsed)

    def _or_go_on(self, save: Callable[[], None]) -> None:
        """A checkpoint that cannot be written is no reason to lose the steps: the next one may be, the last must."""
        try:
            save()
        except NotSaved as failure:
            if self.processes.is_first or save == self._snapshot:  # which each rank writes for itself
                print(f"\n{failure}; the run goes on, its last checkpoint is the one before", flush=True)

    def _save(self) -> None:
        self.watchdog.at(f"the checkpoint of step {self.step}", is_limited=False)
        self.saved_at = -1
        with self.clock.stopped():
            loader = of_all_ranks(self.start.loader.state_dict(self.step), self.processes)
            self.start.checkpoints.save(self.step, self.engine, loader, self._progress(), self._average(), self._part())
        self.saved_at = self.step

    def _snapshot(self) -> None:
        self.watchdog.at(f"the snapshot of step {self.step}", is_limited=False)
        with self.clock.stopped():
            loader = self.start.loader.state_dict(self.step)
            self.start.snapshots.save(self.step, self.engine, loader, self._progress(), self._average(), self._part())

    def _progress(self) -> dict[str, Any]:
        return {"elapsed": self.clock.elapsed(), "skipped_steps": self.skipped_steps}

    def _average(self) -> dict[str, Tensor] | None:
        return self.average.weights if self.average else None

    def _part(self) -> Tensor | None:
        return self.loss.normalisers.part() if self.loss.normalisers else None


def build_grad_cache(
    config: TrainConfig, model: CLIPConfig, engine: Engine, processes: Processes, loss: Loss
) -> GradCache:
    """GradCache over the engine's model, from images and token ids as the loader makes them."""

    def clip(image: Tensor, text: Tensor, negative_text: Tensor | None = None) -> dict[str, Tensor]:
        pixels = normalize_image(image, model.image_mean, model.image_std, engine.dtype)
        texts = text if negative_text is None else torch.cat((text, negative_text))
        outputs = engine.forward(pixels, texts)
        if negative_text is not None:
            outputs["text_features"], outputs["negative_text_features"] = outputs["text_features"].split(len(text))
        return outputs

    chunk_size = config.chunk_size or config.global_batch // processes.world_size
    return GradCache(
        {"clip": clip}, loss, chunk_size, processes.group, engine.backward, engine.set_boundary, processes.device
    )
