"""What the cases of the encoders' ops share: a scalar of an output that costs little, budgets, our variants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Budget, Loss, Problem, Variant
from benchmarks.cases.losses import INTERPRETED
from fastclip._version import __version__

# Eager code's own error: what is outside computes something else.
BUDGETS = {"float32": Budget(1e-5, 5e-6), "float16": Budget(2e-3, 4e-3), "bfloat16": Budget(1e-2, 2e-2)}


class _Probe(torch.autograd.Function):
    """sum(out * weight) in fp32, whose gradient for out is the weight as it stands: one pass, and none backward."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.mul(out, weight).sum(dtype=torch.promote_types(out.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def probe(out: Tensor) -> Tensor:
    """A scalar that every element of out has a part in, with weights that do not cancel."""
    weight = torch.linspace(0.5, 1.5, out.shape[-1], dtype=out.dtype, device=out.device).expand_as(out)
    return _Probe.apply(out, weight.contiguous())


def our_variants(
    problem: Problem, loss: Callable[..., Tensor], verdicts: Sequence[Any], skip: tuple[str, ...]
) -> list[Variant]:
    """What "auto" takes, and by name what it does not, but for `skip`, which stand in the case by another name."""
    chosen = next(verdict.impl for verdict in verdicts if verdict.chosen)
    version, budget = f"fastclip {__version__}", BUDGETS[problem.dtype]
    variants = [Variant("auto", _with_impl(loss, "auto"), budget, f"{version} {chosen}")]
    for verdict in verdicts:
        if verdict.chosen or verdict.impl in skip:
            continue
        cannot = None if verdict.reason.startswith("auto prefers") else verdict.reason
        reason = INTERPRETED if verdict.impl == "triton" and problem.device == "cpu" else cannot
        load = _with_impl(loss, verdict.impl)
        variants.append(Variant(verdict.impl, load, budget, f"{version} {verdict.impl}", why_not=reason))
    return variants


def _with_impl(loss: Callable[..., Tensor], impl: str) -> Callable[[], Loss]:
    return lambda: lambda *inputs: loss(*inputs, impl=impl)
