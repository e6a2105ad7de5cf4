"""Interleaved timing: in every round each implementation takes its turn, and each round another one begins.

What disturbs the machine for a second disturbs all of them, so that a ratio, the mean of what the middle half of the
rounds say, holds where times do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.case import PHASES, Loss

BLOCK_SECONDS = 0.01  # a turn repeats short calls up to this
MOST_REPEATS = 100
FLUSH_BYTES = 256 << 20  # more than any GPU's L2


class Sample(NamedTuple):
    """Milliseconds of one turn, the mean over its repeats."""

    forward: float
    backward: float


class Subject(Protocol):
    """What takes turns."""

    def block(self, repeats: int) -> Sample: ...


class Quantiles(NamedTuple):
    p50: float
    p20: float
    p80: float


def time_block(loss: Loss, inputs: tuple[Tensor, ...], without: tuple[int, ...], repeats: int) -> Sample:
    """`repeats` forward and backward passes: perf_counter on the CPU, events with a flushed L2 on CUDA."""
    wanted = [x for i, x in enumerate(inputs) if i not in without]
    if inputs[0].is_cuda:
        return _time_cuda(loss, inputs, wanted, repeats)
    forward = backward = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        value = loss(*inputs)
        middle = time.perf_counter()
        torch.autograd.grad(value, wanted)
        forward, backward = forward + middle - start, backward + time.perf_counter() - middle
    return Sample(1e3 * forward / repeats, 1e3 * backward / repeats)


def _time_cuda(loss: Loss, inputs: tuple[Tensor, ...], wanted: list[Tensor], repeats: int) -> Sample:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=inputs[0].device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(repeats)]
    for start, middle, end in events:
        flush.zero_()
        start.record()
        value = loss(*inputs)
        middle.record()
        torch.autograd.grad(value, wanted)
        end.record()
        del value
    torch.cuda.synchronize()
    return Sample(
        statistics.fmean(start.elapsed_time(middle) for start, middle, _ in events),
        statistics.fmean(middle.elapsed_time(end) for _, middle, end in events),
    )


def repeats_for(seconds: float) -> int:
    """How often a call of that length is repeated in one turn."""
    return max(1, min(MOST_REPEATS, int(BLOCK_SECONDS / max(seconds, 1e-9))))


def interleave(
    subjects: Mapping[str, Subject], repeats: Mapping[str, int], seconds: float, least: int = 5, most: int = 300
) -> tuple[dict[str, list[Sample]], dict[str, Exception]]:
    """Rounds until `seconds` have passed, at least `least` and at most `most`.

    Returns:
        The samples by name, one a round, and the errors of those that failed, which take no further turn.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in subjects}
    failures: dict[str, Exception] = {}
    names, start = list(subjects), time.perf_counter()
    for turn in range(most):
        if not names or (turn >= least and time.perf_counter() - start > seconds):
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            try:
                samples[name].append(subjects[name].block(repeats[name]))
            except Exception as error:  # whatever a peer does in the middle of a run, the others go on
                failures[name] = error
        names = [name for name in names if name not in failures]
    return {name: samples[name] for name in names}, failures


def quantiles(samples: list[Sample]) -> dict[str, Quantiles]:
    """By phase."""
    return {phase: _quantiles(_values(samples, phase)) for phase in PHASES}


def ratio(baseline: list[Sample], samples: list[Sample], phase: str) -> float:
    """How many times as fast as the baseline, the geometric mean over the middle half of the rounds.

    What slows a whole round cancels. The mean of a middle half moves smoothly where the machine has two moods, between
    which a median jumps.
    """
    pairs = zip(_values(baseline, phase), _values(samples, phase), strict=True)
    ordered = sorted(before / after for before, after in pairs)
    cut = (len(ordered) + 1) // 4
    return statistics.geometric_mean(ordered[cut : len(ordered) - cut])


def _values(samples: list[Sample], phase: str) -> list[float]:
    return [sum(sample) if phase == "both" else getattr(sample, phase) for sample in samples]


def _quantiles(values: list[float]) -> Quantiles:
    if len(values) == 1:
        return Quantiles(values[0], values[0], values[0])
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return Quantiles(statistics.median(values), p20, p80)
