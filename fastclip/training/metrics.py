"""What a run says of itself while it trains: metrics.jsonl, a progress bar, TensorBoard and W&B when asked for."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fastclip.training.config import TrainConfig

# The keys of a line of metrics.jsonl; `step` counts optimizer steps from 1, times are in seconds.
KEYS = (
    "step",
    "epoch",
    "samples",  # pairs seen by all ranks
    "loss",  # nats, of this step's global batch
    "logit_scale",  # exponentiated
    "lr",  # AdamW's
    "grad_norm",
    "samples_per_s",  # over the steps since the last line
    "data_wait",  # share of that time spent waiting for the loader
    "step_time",  # mean over those steps
    "elapsed",  # of training, over all resumes
    "skipped_steps",  # because of a gradient that was not finite
    "skipped_samples",  # by cause, so far
)


class Clock:
    """Time, data wait and steps since the last line."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def read(self, pairs_per_step: int) -> dict[str, float]:
        spent, steps, waited = time.perf_counter() - self.started, self.steps, self.waited
        self._begin()
        return {
            "samples_per_s": steps * pairs_per_step / spent,
            "data_wait": waited / spent,
            "step_time": spent / steps,
        }


class Metrics:
    """The first rank's log; the others make none."""

    def __init__(self, run: Path, config: TrainConfig, start_step: int) -> None:
        from tqdm import tqdm

        self._path = run / "metrics.jsonl"
        _drop_lines_after(self._path, start_step)
        total = None if config.minutes else config.steps
        bar_format = "{desc} {n_fmt} steps [{elapsed}{postfix}]" if config.minutes else None
        self._minutes = config.minutes
        self.bar = tqdm(total=total, initial=start_step, desc="train", bar_format=bar_format, mininterval=0.5)
        self._sinks = _sinks(run, config)

    def write(self, line: dict[str, Any]) -> None:
        assert tuple(line) == KEYS
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = f", {line['samples_per_s']:.0f} pairs/s, loss {line['loss']:.3f}, scale {line['logit_scale']:.1f}"
        shown += f", data wait {line['data_wait']:.0%}"
        left = f" of {self._minutes:g} min" if self._minutes else ""
        self.bar.set_postfix_str(left.lstrip() + shown.lstrip(", " if not left else ""), refresh=False)
        for sink in self._sinks:
            sink({key: value for key, value in line.items() if isinstance(value, (int, float))}, line["step"])

    def close(self) -> None:
        self.bar.close()


def _drop_lines_after(path: Path, step: int) -> None:
    """A resumed run goes on from its checkpoint: later lines of the run that was cut off are not its own."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        path.write_text("".join(f"{line}\n" for line in lines))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # the last line of a run that was killed while writing it
        return float("inf")


def _sinks(run: Path, config: TrainConfig) -> list[Any]:
    sinks = []
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run / "tensorboard"))
        sinks.append(lambda values, step: [writer.add_scalar(k, v, step) for k, v in values.items()])
    if config.wandb:
        import wandb

        wandb.init(project=config.wandb, dir=str(run), config=config.to_dict(), resume="allow")
        sinks.append(lambda values, step: wandb.log(values, step=step))
    return sinks


def total_skips(skipped: Counter[str], processes: Any) -> dict[str, int]:
    """Skipped samples by cause, over all ranks; every rank must call it."""
    causes = processes.gather(sorted(skipped.items()))
    total: Counter[str] = Counter()
    for items in causes:
        total.update(dict(items))
    return dict(total)
