"""Progress while it trains: a bar on a terminal, and in a log file a line every ten seconds."""

from __future__ import annotations

import time
from typing import Protocol, TextIO

from fastclip.training.config import TrainConfig

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    def show(self, step: int, elapsed: float, figures: str) -> None:
        """After each step: steps done, seconds of training, and the last figures in words."""

    def close(self) -> None: ...


def progress_on(stream: TextIO, config: TrainConfig, start_step: int) -> Progress:
    return _Bar(stream, config, start_step) if stream.isatty() else _Lines(stream, config)


class _Bar:
    def __init__(self, stream: TextIO, config: TrainConfig, start_step: int) -> None:
        from tqdm import tqdm

        self._seconds = round(60 * config.minutes)
        # A run with a time limit fills the bar with its seconds, any other with its steps.
        total, counted = (self._seconds, "{n:.0f}/{total:.0f} s") if self._seconds else (config.steps, "{n}/{total}")
        layout = "{desc} {percentage:3.0f}%|{bar:20}| " + counted + " [{elapsed}{postfix}]"
        self._bar = tqdm(total=total, initial=start_step, desc="train", bar_format=layout, mininterval=0.5, file=stream)
        if self._seconds:
            self._bar.n = 0

    def show(self, step: int, elapsed: float, figures: str) -> None:
        done = min(round(elapsed), self._seconds) if self._seconds else step
        self._bar.set_postfix_str(f"step {step}, {figures}" if self._seconds else figures, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    def __init__(self, stream: TextIO, config: TrainConfig) -> None:
        self._stream, self._minutes, self._steps = stream, config.minutes, config.steps
        self._next, self._last = 0.0, ""

    def show(self, step: int, elapsed: float, figures: str) -> None:
        done = (
            f"step {step}, {elapsed / 60:.1f} of {self._minutes:g} min"
            if self._minutes
            else f"step {step}/{self._steps}"
        )
        self._last = f"train: {done}, {figures}"
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SECONDS_BETWEEN_LINES
            self._print()

    def close(self) -> None:
        self._print()

    def _print(self) -> None:
        if self._last:
            print(self._last, file=self._stream, flush=True)
            self._last = ""
