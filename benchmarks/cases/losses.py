"""What the cases of the two losses share: inputs, budgets, the variants of eager code and ours, sizes, formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.case import Budget, Loss, Problem, Variant, compiled
from fastclip._version import __version__

# What this package promises of the gradient it returns, at a scale of 100. In fp32 it may err twice as much as eager.
OURS = {
    "float32": Budget(1e-5, 4e-6, beside_baseline=2),
    "float16": Budget(1e-5, 1e-3),
    "bfloat16": Budget(1e-5, 2.5e-3),
}
# Right up to the rounding of 16-bit logits (or of TF32 products): what is outside computes something else.
OTHERS = {"float32": Budget(1e-3, 5e-3), "float16": Budget(1e-2, 2e-2), "bfloat16": Budget(2e-2, 5e-2)}
INTERPRETED = "a GPU kernel, which the CPU runs in an interpreter: nothing to time"


def pairs(n: int, d: int, dtype: str, device: str = "cpu", **options: Any) -> Problem:
    return Problem((("n", n), ("d", d)), dtype, device, **options)


def product_operations(problem: Problem) -> float:
    """G: one N x N x D product."""
    return 2.0 * problem["n"] ** 2 * problem["d"]


def traffic(problem: Problem, phase: str) -> float:
    """Every pass reads both towers, the backward writes their gradients."""
    towers = 2.0 * problem["n"] * problem["d"] * problem.torch_dtype.itemsize
    return {"forward": towers, "backward": 2 * towers, "both": 3 * towers}[phase]


def eager_variants(problem: Problem, open_clip: Callable[[], Loss], textbook: Loss) -> list[Variant]:
    """open_clip's module, or the textbook where it is not installed; and torch.compile of the same."""
    has_open_clip = peers.installed("open_clip")
    load = open_clip if has_open_clip else lambda: textbook
    version = peers.version_of("open_clip") if has_open_clip else f"torch {torch.__version__}"

    name = "open_clip" if has_open_clip else "eager"
    budget = OTHERS[problem.dtype]
    variants = [
        Variant(name, load, budget, version, is_baseline=True, is_quadratic=True),
        Variant("compile", compiled(load), budget, f"torch {torch.__version__}", is_quadratic=True, compiles=True),
    ]
    if not has_open_clip:
        reason = "open_clip is not installed (pip install open_clip_torch): the textbook is the baseline"
        variants.append(Variant("open_clip", load, budget, "open_clip_torch", why_not=reason))
    return variants


def our_variants(
    problem: Problem, loss: Callable[..., Tensor], verdicts: Sequence[Any], gradient_in_forward: bool = False
) -> list[Variant]:
    """What "auto" takes, and by name what it does not.

    Args:
        loss: called with the inputs and `impl`.
        verdicts: what the op's `explain` says for the problem.
    """
    chosen = next(verdict.impl for verdict in verdicts if verdict.chosen)
    version, budget = f"fastclip {__version__}", OURS[problem.dtype]
    auto = Variant(
        "auto", _with_impl(loss, "auto"), budget, f"{version} {chosen}", gradient_in_forward=gradient_in_forward
    )
    variants = [auto]
    for verdict in verdicts:
        if verdict.chosen:
            continue
        name, cannot = verdict.impl, None if verdict.reason.startswith("auto prefers") else verdict.reason
        reason = INTERPRETED if name == "triton" and problem.device == "cpu" else cannot
        named = replace(auto, impl=name, load=_with_impl(loss, name), version=f"{version} {name}", why_not=reason)
        variants.append(replace(named, is_quadratic=name == "dense"))
    return variants


def _with_impl(loss: Callable[..., Tensor], impl: str) -> Callable[[], Loss]:
    return lambda: lambda *inputs: loss(*inputs, impl=impl)
