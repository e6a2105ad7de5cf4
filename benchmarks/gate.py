"""Correct first: a variant whose loss or gradients are outside its budget against fp64 is reported, not timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.case import Budget, Case, Loss, Problem

GATE_SIZE = 8192  # larger problems are judged at this size: fp64 takes minutes beyond


class Errors(NamedTuple):
    loss: float
    gradient: float  # the worst of the inputs


def value_and_gradients(loss: Loss, inputs: Sequence[Tensor], without: Sequence[int] = ()) -> list[Tensor]:
    """The loss and its gradient for each input but those numbered in `without`."""
    value = loss(*inputs)
    wanted = [x for i, x in enumerate(inputs) if i not in without]
    return [value.detach(), *torch.autograd.grad(value, wanted)]


@lru_cache(maxsize=32)  # problems beyond the gate's size come long after the one that they are judged by
def _truth(case: Case, problem: Problem) -> list[Tensor]:
    inputs = [x.detach().double().requires_grad_() for x in case.make_inputs(problem)]
    return value_and_gradients(case.exact, inputs)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """In the Frobenius norm; of a scalar below 1, absolute: it is what is left when terms of order 1 cancel."""
    norm = exact.norm().item()
    return (value.double() - exact).norm().item() / (max(norm, 1.0) if exact.ndim == 0 else norm)


def errors_of(case: Case, problem: Problem, loss: Loss, without: Sequence[int] = ()) -> Errors:
    """Of a loss and its gradients on the problem, at most `GATE_SIZE` large."""
    problem = problem.capped(GATE_SIZE)
    value, *gradients = value_and_gradients(loss, case.make_inputs(problem), without)
    exact_value, *exact_gradients = _truth(case, Problem(problem.sizes, problem.dtype, problem.device))
    kept = [x for i, x in enumerate(exact_gradients) if i not in without]
    loss_error = (value.double() - exact_value).abs().item() / exact_value.abs().item()
    errors = [relative_error(x.reshape(y.shape), y) for x, y in zip(gradients, kept, strict=True)]
    return Errors(loss_error, math.nan if any(math.isnan(error) for error in errors) else max(errors))


def allowed(budget: Budget, baseline: Errors | None) -> Errors:
    """The largest errors that pass."""
    beside = budget.beside_baseline * baseline.gradient if baseline is not None else 0.0
    return Errors(budget.loss, max(budget.gradient, beside))


def passes(errors: Errors, most: Errors) -> bool:
    """NaN does not."""
    return errors.loss <= most.loss and errors.gradient <= most.gradient
