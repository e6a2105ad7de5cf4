"""The ops of a block between its products: the norm with its residual, and the activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Loss, Problem, Variant, compiled
from benchmarks.cases.encoders import BUDGETS, our_variants, probe
from fastclip.ops import activation as activation_op
from fastclip.ops import layer_norm as layer_norm_op


def shape(n: int, d: int, dtype: str, device: str = "cpu", **options: Any) -> Problem:
    """n tokens of d features."""
    options.setdefault("has_peak", device == "cuda")
    return Problem((("n", n), ("d", d)), dtype, device, **options)


def _away(generator: torch.Generator, problem: Problem, mean: float, *rows: int) -> Tensor:
    """Values whose weighted sum does not cancel."""
    x = torch.randn(*rows, problem["d"], generator=generator) + mean
    return x.to(problem.device, problem.torch_dtype).requires_grad_()


def _with_compile(budget: Any, load: Callable[[], Loss]) -> list[Variant]:
    version = f"torch {torch.__version__}"

    return [
        Variant("eager", load, budget, version, is_baseline=True),
        Variant("compile", compiled(load), budget, version, compiles=True),
    ]


def _norm_inputs(problem: Problem) -> tuple[Tensor, ...]:
    generator, rows = torch.Generator().manual_seed(0), problem["n"]
    x, residual = _away(generator, problem, 0, rows), _away(generator, problem, 1, rows)
    return x, residual, _away(generator, problem, 1), _away(generator, problem, 1)


def _norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, impl: str = "reference") -> Tensor:
    out, total = layer_norm_op.layer_norm(x, weight, bias, residual, impl=impl)
    return probe(out) + probe(total)


def _eager_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    total = x + residual
    return probe(F.layer_norm(total, weight.shape, weight, bias)) + probe(total)


def _norm_variants(problem: Problem) -> list[Variant]:
    verdicts = layer_norm_op.explain(problem.device, problem.torch_dtype)
    found = _with_compile(BUDGETS[problem.dtype], lambda: _eager_norm)
    return [*found, *our_variants(problem, _norm, verdicts, skip=("reference",))]


def _act_inputs(problem: Problem) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (_away(generator, problem, 1, problem["n"]),)


def _act_case(kind: str, eager: Callable[[Tensor], Tensor]) -> Case:
    def ours(x: Tensor, impl: str) -> Tensor:
        return probe(activation_op.activation(x, kind=kind, impl=impl))

    def variants(problem: Problem) -> list[Variant]:
        verdicts = activation_op.explain(problem.device, problem.torch_dtype, kind)
        found = _with_compile(BUDGETS[problem.dtype], lambda: lambda x: probe(eager(x)))
        return [*found, *our_variants(problem, ours, verdicts, skip=("reference",))]

    def exact(x: Tensor) -> Tensor:
        return ours(x, "reference")

    traffic = _traffic(2, 3)
    return Case(kind, _act_inputs, exact, variants, _operations(8), traffic, _act_problems, _quick, has_products=False)


def _operations(an_element: float) -> Callable[[Problem, str], float]:
    return lambda problem, phase: an_element * problem["n"] * problem["d"] * (2 if phase == "both" else 1)


def _traffic(forward: float, backward: float) -> Callable[[Problem, str], float]:
    """Passes over (n, d)."""
    passes = {"forward": forward, "backward": backward, "both": forward + backward}
    return lambda problem, phase: passes[phase] * problem["n"] * problem["d"] * problem.torch_dtype.itemsize


def _norm_problems(device: str) -> Sequence[Problem]:
    """ViT-B and ViT-L; packed text."""
    if device == "cuda":
        return (shape(197 * 1024, 768, "bfloat16", device, rank=2), shape(16384, 512, "bfloat16", device, rank=6))
    return tuple(shape(800, 768, dtype, rank=3) for dtype in ("float32", "bfloat16"))


def _act_problems(device: str) -> Sequence[Problem]:
    if device == "cuda":
        return (shape(197 * 1024, 3072, "bfloat16", device, rank=2), shape(16384, 2048, "bfloat16", device, rank=6))
    return tuple(shape(800, 3072, dtype, rank=3) for dtype in ("float32", "bfloat16"))


def _quick(device: str) -> Sequence[Problem]:
    return (shape(64, 96, "float32", device, impls=("auto",), has_peak=False),)


CASES = (
    Case(
        "layer_norm",
        _norm_inputs,
        _norm,
        _norm_variants,
        _operations(10),
        _traffic(4, 4),
        _norm_problems,
        _quick,
        has_products=False,
    ),
    _act_case("gelu", F.gelu),
    _act_case("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
)
