"""What a run says of itself: lines of metrics.jsonl, rates, the bar on a terminal and the lines in a log file."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from contrastive_loss_helpers import run_on_ranks
from training_helpers import lines, options, small_data, this_rank

from fastclip.training import progress
from fastclip.training.__main__ import parse
from fastclip.training.config import TrainConfig
from fastclip.training.loop import train
from fastclip.training.metrics import KEYS, Clock, Metrics, in_words
from fastclip.training.progress import progress_on

TIMEOUT = 300


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def line(step: int, **changed: Any) -> dict[str, Any]:
    return dict.fromkeys(KEYS, 1.0) | {"step": step, "skipped_samples": {}, "source_samples": {}} | changed


def test_a_resumed_log_goes_on_from_its_step(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, TrainConfig(), 0)
    for step in (1, 2, 3):
        metrics.write(line(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing it
    Metrics(tmp_path, TrainConfig(), 2).write(line(3, loss=2.0))
    assert [(one["step"], one["loss"]) for one in lines(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    Metrics(tmp_path, TrainConfig(), 0).write(line(1, loss=float("nan"), grad_norm=float("inf")))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert (json.loads(text)["loss"], json.loads(text)["grad_norm"]) == (None, None)


def test_evaluations_count_as_elapsed_and_in_no_rate() -> None:
    clock = Clock(elapsed=100.0)
    time.sleep(0.05)
    with clock.stopped():
        time.sleep(0.5)
    clock.steps, clock.waited = 5, 0.01
    read = clock.read(pairs_per_step=10)
    assert 100.5 < clock.elapsed() < 110
    assert 0.01 <= read["step_time"] < 0.1
    assert read["samples_per_s"] == pytest.approx(10 / read["step_time"])
    assert read["data_wait"] == pytest.approx(0.01 / (5 * read["step_time"]))


@pytest.mark.parametrize(("minutes", "last"), [(0, "step 7/9, "), (2.0, "step 7, 1.0 of 2 min, ")])
def test_a_log_file_gets_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, minutes: float, last: str) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shown = progress_on(stream, TrainConfig(steps=9, minutes=minutes), 0)
    for step in range(1, 8):
        shown.show(step, 60.0, f"loss {step}")
        now[0] += 4.0
    shown.close()
    said = stream.getvalue().splitlines()
    assert [one.rsplit(", ", 1)[1] for one in said] == ["loss 1", "loss 4", "loss 7"]
    assert said[-1] == f"train: {last}loss 7"
    assert "\r" not in stream.getvalue()


@pytest.mark.parametrize(("minutes", "part"), [(0, "7/9 ["), (1.0, "30/60 s [")])
def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, minutes: float, part: str) -> None:
    stream = Terminal()
    shown = progress_on(stream, TrainConfig(steps=9, minutes=minutes), 0)
    shown.show(7, 30.0, "loss 2.5")
    shown.close()
    assert part in stream.getvalue()
    assert "loss 2.5" in stream.getvalue()


def test_skips_in_words() -> None:
    assert in_words({"unreadable_image": 2, "empty_caption": 1}) == "1 empty caption, 2 unreadable image"


def half_and_whole(words: list[str]) -> None:
    for steps in (6, 12):
        train(parse([*words, "--steps", str(steps), "--resume", "latest"]), this_rank())


def test_a_mixture_is_counted_by_source_over_ranks_and_resumes(tmp_path: Path) -> None:
    """Twice as many of the one as of the other, by upsampling; the counts go on where a run does, skips too."""
    cut = {f"s{number}": {"txt": b"red circle on a table " * 30, "json": None} for number in range(64)}
    one, two = (small_data(tmp_path / name, 64, **broken) for name, broken in (("one", {}), ("two", cut)))
    mixture = f"{one / '*.tar'}::{two / '*.tar'}"
    common: dict[str, Any] = {"upsampling": "2::1", "tokenizer": one / "tokenizer.json", "schedule": "constant"}
    run_on_ranks(2, half_and_whole, options(one, tmp_path / "run", **common | {"data": mixture}), timeout=TIMEOUT)
    for line in lines(tmp_path / "run"):
        counts = list(line["source_samples"].values())
        assert len(counts) == 2
        assert sum(counts) == line["samples"]
        assert line["skipped_samples"] == {"truncated_caption": counts[1]}
    assert counts == [128, 64]  # a whole epoch
