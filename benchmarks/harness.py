"""All implementations on one problem: gate, memory, interleaved timing, rows."""

from __future__ import annotations

import gc
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks import machine, rows
from benchmarks.base import Base
from benchmarks.case import PHASES, Case, Problem, Variant
from benchmarks.gate import GATE_SIZE, Errors, allowed, passes
from benchmarks.runner import Remote, Runner
from benchmarks.timing import Sample, interleave, quantiles, ratio, repeats_for

MATRICES = 8  # N x N, in the type of the features: what eager code with autograd holds, and a little
LONGEST_CALL = 40.0  # seconds; longer ones are left out
GIB = 1 << 30


class DeviceLost(RuntimeError):
    """The CUDA context is dead: whatever else this process measures fails."""


@dataclass
class Run:
    """Where rows go, and what all of them share."""

    out: Path
    seconds: float  # of rounds each time a problem is looked at
    is_quick: bool = False
    is_refined: bool = False  # problems are looked at again and again: once, one round is enough
    base: Base | None = None
    failed: set[tuple[str, ...]] = field(default_factory=set)  # (op, impl, device, dtype, shape): not tried again
    told: set[tuple[str, ...]] = field(default_factory=set)  # reasons are told once an op

    def write(self, written: list[rows.Row]) -> None:
        rows.append(self.out, written)


@dataclass
class Candidate:
    """A variant that can run, with what is known of it so far."""

    variant: Variant
    runner: Runner | Remote
    errors: Errors
    most: Errors  # the errors that pass
    peak: float | None = None
    repeats: int = 0  # calls a turn; 0: not known yet
    samples: list[Sample] = field(default_factory=list)  # one a round


def measure(case: Case, problem: Problem, run: Run) -> list[rows.Row]:
    """The rows of one problem, which are in the file when this returns.

    Raises:
        DeviceLost: the row that says so is in the file too.
    """
    with closing(Measurement(case, problem, run)) as measurement:
        return measurement.look()


class Measurement:
    """One problem, of which each `look` takes more rounds; between two looks it holds no inputs."""

    def __init__(self, case: Case, problem: Problem, run: Run) -> None:
        self.case, self.problem, self.run = case, problem, run
        self.candidates: list[Candidate] | None = None  # None before the first look
        self.seconds = 0.0  # of rounds, over all looks

    @property
    def rounds(self) -> int:
        return max((len(candidate.samples) for candidate in self.candidates or ()), default=0)

    def look(self) -> list[rows.Row]:
        """The rows of all rounds so far, which are in the file when this returns, in place of earlier ones.

        Raises:
            DeviceLost: as `measure`.
        """
        try:
            if self.candidates is None:
                self.candidates = self._passed()
            if self.problem.is_timed:
                self.seconds += _time(self.case, self.problem, self.run, self.candidates)
            self.run.write(written := self.rows())
            return written
        finally:
            for candidate in self.candidates or ():
                candidate.runner.rest()
            _tidy(self.problem)

    def rows(self) -> list[rows.Row]:
        return _rows(self.case, self.problem, self.run, self.candidates or [])

    def close(self) -> None:
        if self.candidates:
            self.candidates.clear()
        _tidy(self.problem)

    def _passed(self) -> list[Candidate]:
        """What can run, with its peak."""
        case, problem, run = self.case, self.problem, self.run
        if case.has_products and not machine.has_products(problem.device, problem.torch_dtype):
            _leave_out(case, problem, run)
            return []
        candidates = _gate(case, problem, run)
        for candidate in list(candidates) if problem.has_peak else []:
            try:
                candidate.peak = candidate.runner.peak()
            except Exception as error:  # out of memory, most likely: then there is nothing to time either
                candidates.remove(candidate)
                _fail(case, problem, run, candidate.variant, error)
        return candidates


def _gate(case: Case, problem: Problem, run: Run) -> list[Candidate]:
    candidates: list[Candidate] = []
    baseline: Errors | None = None
    for variant in [*case.variants(problem), *_base_variant(case, problem, run)]:
        if variant.impl != "base" and problem.impls and not (variant.is_baseline or variant.impl in problem.impls):
            continue
        reason = variant.why_not or _too_large(problem, variant)
        if _name(case, problem, variant) in run.failed:
            continue
        if reason is not None:
            if (case.op, variant.impl, reason) not in run.told:
                run.told.add((case.op, variant.impl, reason))
                _tell(case, problem, run, variant, f"not run: {reason}")
            continue
        try:
            runner = _runner(case, problem, run, variant)
            errors = runner.errors()
            may_be_slow = problem.is_timed and variant.impl not in ("auto", "base")
            seconds = runner.expected_seconds() if may_be_slow else 0.0
        except Exception as error:  # a peer may fail in any way; the row says how, the others go on
            _fail(case, problem, run, variant, error)
            continue
        most = allowed(variant.budget, baseline)
        if variant.is_baseline:
            baseline = errors
        if not passes(errors, most):
            _reject(case, problem, run, variant, errors, most)
        elif seconds > LONGEST_CALL:
            _tell(case, problem, run, variant, f"not run: a call would take about {seconds:.0f} s")
        else:
            candidates.append(Candidate(variant, runner, errors, most))
    return candidates


def _base_variant(case: Case, problem: Problem, run: Run) -> list[Variant]:
    if run.base is None:
        return []
    ours = case.variant(problem, "auto")
    return [replace(ours, impl="base", version=f"fastclip {run.base.commit}")]


def _runner(case: Case, problem: Problem, run: Run, variant: Variant) -> Runner | Remote:
    if variant.impl == "base" and run.base is not None:
        return Remote(case, problem, "auto", run.base.prelude)
    return Runner(case, problem, variant)


def _too_large(problem: Problem, variant: Variant) -> str | None:
    if not variant.is_quadratic:
        return None
    needed = MATRICES * problem.sizes[0][1] ** 2 * problem.torch_dtype.itemsize
    free = machine.free_memory(problem.device)
    if free is None or needed < free:
        return None
    return f"it needs about {needed / GIB:.0f} GiB, {free / GIB:.0f} are free"


def _time(case: Case, problem: Problem, run: Run, candidates: list[Candidate]) -> float:
    """Seconds of its rounds."""
    for candidate in list(candidates):
        try:
            if candidate.repeats:
                candidate.runner.resume()
            else:
                candidate.repeats = repeats_for(candidate.runner.warm_up())
        except Exception as error:  # as in the gate
            candidates.remove(candidate)
            _fail(case, problem, run, candidate.variant, error)
    by_name = {candidate.variant.impl: candidate for candidate in candidates}
    subjects = {name: candidate.runner for name, candidate in by_name.items()}
    repeats = {name: candidate.repeats for name, candidate in by_name.items()}
    least = 1 if run.is_refined else 3 if problem.sizes[0][1] > GATE_SIZE else 5
    start = time.perf_counter()
    samples, failures = interleave(subjects, repeats, run.seconds, least)
    seconds = time.perf_counter() - start
    for name, failure in failures.items():
        candidates.remove(by_name[name])
        _fail(case, problem, run, by_name[name].variant, failure)
    for name, taken in samples.items():
        by_name[name].samples += taken
    return seconds


def _rows(case: Case, problem: Problem, run: Run, candidates: list[Candidate]) -> list[rows.Row]:
    roof = machine.roofline(problem.device, problem.torch_dtype, run.is_quick)
    baseline = _baseline(candidates, run)
    shared = _shared(case, problem)
    written = []
    for candidate in candidates:
        times = quantiles(candidate.samples) if candidate.samples else None
        for phase in PHASES:
            error, budget = _error_of(candidate, phase)
            fields: dict[str, object] = {"error": error, "budget": budget}
            if phase == "both":
                fields["peak_mb"] = candidate.peak
            if times is not None:
                own = times[phase]
                fields |= dict(zip(("p50_ms", "p20_ms", "p80_ms"), own, strict=True))
                fields |= _speeds(case, problem, candidate.variant, phase, own.p50, roof)
                if baseline is not None and baseline.samples:
                    fields["baseline"] = baseline.variant.impl
                    if not _is_done_before(candidate.variant, phase):
                        fields["ratio"] = ratio(baseline.samples, candidate.samples, phase)
            elif phase != "both":
                continue
            variant = candidate.variant
            written.append(
                rows.make_row(impl=variant.impl, peer_version=variant.version, phase=phase, **fields, **shared)
            )
    return written


def _baseline(candidates: list[Candidate], run: Run) -> Candidate | None:
    is_it = [c for c in candidates if (c.variant.impl == "base" if run.base else c.variant.is_baseline)]
    return is_it[0] if is_it else None


def _speeds(
    case: Case, problem: Problem, variant: Variant, phase: str, p50: float, roof: machine.Roofline
) -> dict[str, object]:
    """Empty for a backward whose work the forward did; that forward has the work of both."""
    if _is_done_before(variant, phase):
        return {}
    work = "both" if variant.gradient_in_forward else phase
    operations = case.operations(problem, work)
    predicted = roof.milliseconds(operations, case.traffic(problem, work))
    return {"gflops": operations / p50 / 1e6, "predicted_ms": predicted, "pct_roofline": 100 * predicted / p50}


def _is_done_before(variant: Variant, phase: str) -> bool:
    return variant.gradient_in_forward and phase == "backward"


def _error_of(candidate: Candidate, phase: str) -> tuple[float, float]:
    """The loss's, the gradient's, or the one nearer to its budget."""
    by_phase = dict(zip(("forward", "backward"), zip(candidate.errors, candidate.most, strict=True), strict=True))
    return by_phase.get(phase) or max(by_phase.values(), key=lambda pair: pair[0] / pair[1])


def _shared(case: Case, problem: Problem) -> dict[str, object]:
    return {
        "op": case.op,
        "device": problem.device,
        "dtype": problem.dtype,
        "shape_json": problem.shape_json,
        "machine": machine.machine_name(problem.device),
        "torch": torch.__version__,
        "triton": machine.triton_version(),
        "commit": machine.commit(),
    }


def _name(case: Case, problem: Problem, variant: Variant) -> tuple[str, ...]:
    return (case.op, variant.impl, problem.device, problem.dtype, problem.shape_json)


def _leave_out(case: Case, problem: Problem, run: Run) -> None:
    """The row of a problem that would take minutes a call."""
    ours = case.variant(problem, "auto")
    if _name(case, problem, ours) not in run.failed:
        processor = "GPU" if problem.device == "cuda" else "CPU"
        lacks = f"this {processor} has no products in {problem.dtype}, without which a call takes 100 times as long"
        _tell(case, problem, run, ours, f"not run: {lacks}")


def _tell(case: Case, problem: Problem, run: Run, variant: Variant, reason: str) -> None:
    """The row of a variant that is not measured."""
    shared = _shared(case, problem)
    run.write([rows.make_row(impl=variant.impl, peer_version=variant.version, phase="both", error=reason, **shared)])
    print(f"  {variant.impl:14} {reason}", flush=True)


def _fail(case: Case, problem: Problem, run: Run, variant: Variant, error: Exception) -> None:
    first = (str(error).strip().splitlines() or [""])[0]
    _tell(case, problem, run, variant, f"{type(error).__name__}: {first}"[:300])
    _tidy(problem)
    if "CUDA error" in str(error):
        raise DeviceLost(first) from error


def _reject(case: Case, problem: Problem, run: Run, variant: Variant, errors: Errors, most: Errors) -> None:
    """The row of a variant that is wrong."""
    which = 0 if not errors.loss <= most.loss else 1
    error, budget, shared = errors[which], most[which], _shared(case, problem)
    fields = {"impl": variant.impl, "peer_version": variant.version, "phase": PHASES[which]}
    run.write([rows.make_row(**fields, error=error, budget=budget, **shared)])
    print(
        f"  {variant.impl:14} wrong: {('loss', 'gradient')[which]} error {error:.2g}, must be {budget:.2g}", flush=True
    )


def _tidy(problem: Problem) -> None:
    gc.collect()
    if problem.device == "cuda":
        torch.cuda.empty_cache()
