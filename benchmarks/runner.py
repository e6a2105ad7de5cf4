"""One implementation on one problem: loaded, judged, warmed up and timed; here or in another process.

A `Remote` has the same calls and passes them on to a `Runner` in a process whose `fastclip` is another commit's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Problem, Variant
from benchmarks.gate import GATE_SIZE, Errors, errors_of
from benchmarks.memory import peak_cpu, peak_cuda
from benchmarks.timing import Sample, time_block

WARM_UP_CALLS, WARM_UP_SECONDS = 10, 0.1  # the most of both


class Runner:
    def __init__(self, case: Case, problem: Problem, variant: Variant) -> None:
        self.case, self.problem, self.variant = case, problem, variant
        self.loss = variant.load()
        self.inputs: tuple[Tensor, ...] = ()

    def errors(self) -> Errors:
        """Against fp64."""
        return errors_of(self.case, self.problem, self.loss, self.variant.without_gradient)

    def expected_seconds(self) -> float:
        """How long a call takes, from one at the gate's size; 0 where the problem is no larger."""
        capped = self.problem.capped(GATE_SIZE)
        if capped == self.problem:
            return 0.0
        start = time.perf_counter()
        self.inputs = self.case.make_inputs(capped)
        self.block(1)
        return (time.perf_counter() - start) * (self.problem.sizes[0][1] / GATE_SIZE) ** 2

    def warm_up(self) -> float:
        """Seconds of a call, the shortest of a few: how often a turn repeats it must not hang on one disturbance."""
        self.inputs = self.case.make_inputs(self.problem)
        if self.variant.compiles or self.problem.device == "cuda":
            self.block(1)
        times: list[float] = []
        while len(times) < WARM_UP_CALLS and sum(times) < WARM_UP_SECONDS:
            start = time.perf_counter()
            self.block(1)
            times.append(time.perf_counter() - start)
        return min(times)

    def resume(self) -> None:
        """Ready for turns again after `rest`, its repeats being known."""
        self.inputs = self.case.make_inputs(self.problem)

    def rest(self) -> None:
        """Holds nothing large until it resumes."""
        self.inputs = ()

    def peak(self) -> float | None:
        """MiB beyond inputs and gradients; see `memory`."""
        if self.problem.device != "cuda":
            return peak_cpu(self.case, self.problem, self.variant.impl)
        self.inputs = self.case.make_inputs(self.problem)
        if self.variant.compiles:
            self.block(1)
        return peak_cuda(self.loss, self.inputs, self.variant.without_gradient)

    def block(self, repeats: int) -> Sample:
        return time_block(self.loss, self.inputs, self.variant.without_gradient, repeats)


class Remote:
    """A `Runner` in the process that `prelude` gives its `fastclip`."""

    def __init__(self, case: Case, problem: Problem, impl: str, prelude: str) -> None:
        self.case, self.problem, self.impl, self.prelude = case, problem, impl, prelude
        self.process: subprocess.Popen[str] | None = None

    def errors(self) -> Errors:
        return Errors(*self._ask("errors"))

    def expected_seconds(self) -> float:
        return self._ask("expected_seconds")

    def warm_up(self) -> float:
        return self._ask("warm_up")

    def peak(self) -> float | None:
        if self.problem.device == "cuda":
            return self._ask("peak")
        return peak_cpu(self.case, self.problem, self.impl, self.prelude)

    def block(self, repeats: int) -> Sample:
        return Sample(*self._ask("block", repeats))

    def resume(self) -> None:
        self.warm_up()

    def rest(self) -> None:
        """Ends the process; the next call starts another."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(timeout=60)
            self.process = None

    def _start(self) -> subprocess.Popen[str]:
        code = f"{self.prelude}\nfrom benchmarks.runner import serve\nserve()"
        arguments = [self.case.op, self.impl, self.problem.to_json(), str(torch.get_num_threads())]
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, call: str, *arguments: int) -> Any:
        self.process = self.process or self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([call, *arguments]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of the other commit ended with status {self.process.wait()}")
        return json.loads(answer)


def serve() -> None:
    """The other side of `Remote`: a call a line as JSON on stdin, its answer a line on stdout."""
    from benchmarks.cases import CASES

    op, impl, problem_json, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    case, problem = CASES[op], Problem.from_json(problem_json)
    runner = Runner(case, problem, case.variant(problem, impl))
    for line in sys.stdin:
        call, *arguments = json.loads(line)
        print(json.dumps(getattr(runner, call)(*arguments)), flush=True)
