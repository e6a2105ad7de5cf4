"""Peak memory of one forward and backward pass above what a loss with the same inputs and gradients must take.

On CUDA the allocator knows. On the CPU a fresh process makes the inputs, resets the kernel's mark of its peak resident
memory (/proc/self/clear_refs), runs a loss that does no work but hand back gradients, then the real one; the difference
of the two growths counts. Every large allocation of that process is its own mapping, so that memory given back is gone.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Loss, Problem
from benchmarks.gate import value_and_gradients
from fastclip.training.allocator import give_back_memory

MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
WARM_UP_SIZE = 1100  # thread pools and libraries start on a problem of this size, which is not made in one call
TIMEOUT = 600


class _NoWork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_ones(())

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ones_like(x) for x in ctx.saved_tensors)  # ones: pages that are written exist


def peak_cuda(loss: Loss, inputs: tuple[Tensor, ...], without: tuple[int, ...]) -> float:
    """MiB; a loss that compiles must have done so."""
    return max(0.0, _growth_cuda(loss, inputs, without) - _growth_cuda(_NoWork.apply, inputs, ())) / MIB


def peak_cpu(case: Case, problem: Problem, impl: str, prelude: str = "") -> float | None:
    """MiB; None where the kernel of the operating system does not tell.

    prelude: Python that the fresh process runs first (to take the package from another place).

    Raises:
        RuntimeError: the fresh process failed; its last line.
    """
    code = f"{prelude or f'import sys; sys.path.insert(0, {str(ROOT)!r})'}\nfrom benchmarks.memory import main\nmain()"
    arguments = [sys.executable, "-c", code, case.op, impl, problem.to_json()]
    done = subprocess.run(
        arguments, env=os.environ | ALLOCATOR, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
        raise RuntimeError(f"measuring memory: {last}")
    growth = json.loads(done.stdout.splitlines()[-1])
    return None if growth is None else max(0.0, growth)  # pages are counted in batches: a tiny growth may be below 0


def main() -> None:
    """The fresh process: op, impl and problem from the command line, MiB as JSON to the output."""
    from benchmarks.cases import CASES

    op, impl, problem_json = sys.argv[1:]
    case, problem = CASES[op], Problem.from_json(problem_json)
    variant = case.variant(problem, impl)
    loss, without = variant.load(), variant.without_gradient
    inputs = case.make_inputs(problem)
    warm_up = inputs if variant.compiles else case.make_inputs(problem.capped(WARM_UP_SIZE))
    value_and_gradients(loss, warm_up, without)
    del warm_up
    if _reset_peak():
        growth = _growth_cpu(loss, inputs, without) - _growth_cpu(_NoWork.apply, inputs, ())
        print(json.dumps(growth / MIB))
    else:
        print(json.dumps(None))


def _growth_cpu(loss: Loss, inputs: tuple[Tensor, ...], without: tuple[int, ...]) -> int:
    gc.collect()
    give_back_memory()
    _reset_peak()
    before = _status("VmRSS")
    results = value_and_gradients(loss, inputs, without)
    growth = _status("VmHWM") - before
    del results
    return growth


def _growth_cuda(loss: Loss, inputs: tuple[Tensor, ...], without: tuple[int, ...]) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = value_and_gradients(loss, inputs, without)
    torch.cuda.synchronize()
    growth = torch.cuda.max_memory_allocated() - before
    del results
    return growth


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise KeyError(field)
