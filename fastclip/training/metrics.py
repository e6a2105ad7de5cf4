"""What a run says of itself while it trains: metrics.jsonl, a progress bar, TensorBoard and W&B when asked for."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastclip.training.config import TrainConfig
from fastclip.training.processes import Processes
from fastclip.training.progress import progress_on
from fastclip.training.step_folder import write_atomically

Sink = Callable[[dict[str, float], int], Any]

# The keys of a line of metrics.jsonl; `step` counts optimizer steps from 1, times are in seconds, null is not finite.
KEYS = (
    "step",
    "epoch",
    "samples",  # pairs seen by all ranks
    "loss",  # nats, of this step's global batch
    "logit_scale",  # exponentiated
    "lr",  # AdamW's
    "grad_norm",  # over all ranks' batch, before clipping; under DeepSpeed's Muon its matrices count orthogonalised
    "samples_per_s",  # over the steps since the last line
    "data_wait",  # share of that time spent waiting for the loader
    "step_time",  # mean over those steps
    "stall",  # what saves and evaluations took since the last line, which is in no rate
    "elapsed",  # of training, over all resumes
    "skipped_steps",  # because of a gradient that was not finite
    "skipped_samples",  # by cause, so far
    "source_samples",  # by source of a mixture, so far; of one source they are `samples`
)


class Clock:
    """Time of the run over all its resumes; and time, data wait and steps since the last line, less evaluations."""

    def __init__(self, elapsed: float) -> None:
        self._origin = time.monotonic() - elapsed
        self._begin()

    def _begin(self) -> None:
        self.started, self.waited, self.stall, self.steps = time.perf_counter(), 0.0, 0.0, 0

    def elapsed(self) -> float:
        return time.monotonic() - self._origin

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Around what is no training: it counts as elapsed, and in no rate."""
        before = time.perf_counter()
        yield
        self.stall += time.perf_counter() - before

    def read(self, pairs_per_step: int) -> dict[str, float]:
        """The rates since the last call."""
        steps, waited, stall = self.steps, self.waited, self.stall
        spent = time.perf_counter() - self.started - stall
        self._begin()
        return {
            "samples_per_s": steps * pairs_per_step / spent,
            "data_wait": waited / spent,
            "step_time": spent / steps,
            "stall": stall,
        }


class Metrics:
    """The first rank's log; the others make none."""

    def __init__(self, run: Path, config: TrainConfig, start_step: int) -> None:
        self._path = run / "metrics.jsonl"
        self._path.touch()
        _drop_lines_after(self._path, start_step)
        self._progress = progress_on(sys.stderr, config, start_step)
        self._figures = ""
        self._sinks: list[Sink] = _sinks(run, config)

    def write(self, line: dict[str, Any]) -> None:
        assert tuple(line) == KEYS
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._figures = (
            f"{line['samples_per_s']:.0f} pairs/s, loss {line['loss']:.3f}, scale {line['logit_scale']:.1f}, "
            f"data wait {line['data_wait']:.0%}"
        )
        for sink in self._sinks:
            sink({key: value for key, value in line.items() if isinstance(value, (int, float))}, line["step"])

    def show(self, step: int, elapsed: float) -> None:
        """Where the run stands, with the figures of the last line."""
        self._progress.show(step, elapsed, self._figures)

    def close(self) -> None:
        self._progress.close()


def over_ranks(counts: Counter[str], processes: Processes) -> dict[str, int]:
    """The sum of all ranks' counts; every rank must call it."""
    total: Counter[str] = Counter()
    for items in processes.gather(sorted(counts.items())):
        total.update(dict(items))
    return dict(total)


def of_all_ranks(loader: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """A loader's state with the sum of all ranks' counts in place of this one's; every rank must call it."""
    return loader | {name: over_ranks(Counter(loader[name]), processes) for name in ("skipped", "seen")}


def in_words(skipped: Mapping[str, int]) -> str:
    """`12 unreadable image, 3 truncated caption`."""
    return ", ".join(f"{count} {cause.replace('_', ' ')}" for cause, count in sorted(skipped.items()))


def _drop_lines_after(path: Path, step: int) -> None:
    """A resumed run goes on from its checkpoint: later lines of the run that was cut off are not its own."""
    lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):  # the last line of a run that was killed while writing it
        return float("inf")


def _sinks(run: Path, config: TrainConfig) -> list[Sink]:
    sinks: list[Sink] = []
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run / "tensorboard"))

        def write(values: dict[str, float], step: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        sinks.append(write)
    if config.wandb:
        import wandb

        wandb.init(project=config.wandb, dir=str(run), config=config.to_dict(), resume="allow")
        sinks.append(lambda values, step: wandb.log(values, step=step))
    return sinks
