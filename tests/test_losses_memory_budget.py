"""Logits kept from forward to backward: the same loss and gradient with any budget, and no more than it in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from losses_helpers import OPTIONS, Problem, make_problem
from torch import Tensor

from fastclip.losses import contrastive_loss
from fastclip.testing import clip_features, relative_error

IMPLS = ("reference", "dense", "cpu", "triton")
ROW = 300 * 4  # bytes of a row of logits


def gradients(problem: Problem, options: dict[str, Any], retain: bool = False) -> list[Tensor]:
    inputs = [x.detach().float().requires_grad_() for x in problem.leaves()]
    leaves = [*inputs, *(x for x in options.values() if isinstance(x, Tensor) and x.requires_grad)]
    loss = contrastive_loss(*inputs, **options)
    first = torch.autograd.grad(loss.sum(), leaves, retain_graph=retain)
    if retain:  # what is kept outlives the first backward unharmed
        assert all(map(torch.equal, first, torch.autograd.grad(loss.sum(), leaves)))
    return [loss.detach(), *first]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("budget", [10 * ROW, 130 * ROW, 1 << 30])
@pytest.mark.parametrize("name", ["plain", "ignore, labels", "everything"])
def test_any_budget_gives_the_same(name: str, budget: int, impl: str) -> None:
    """A few rows, more than one tile of them, all."""
    problem = make_problem((200,), (300,), d=24)
    options = problem.options(OPTIONS[name], rank=0)
    without = gradients(problem, options | {"impl": impl})
    with_budget = gradients(problem, options | {"impl": impl, "memory_budget": budget}, retain=True)
    for value, plain in zip(with_budget, without, strict=True):
        if impl == "triton":  # which adds up the text's gradient in other chunks
            assert relative_error(value, plain) <= 1e-6
        else:
            assert torch.equal(value, plain)


def kept_bytes(options: dict[str, Any], n: int = 256) -> int:
    """Of what autograd holds of a loss beyond its inputs."""
    inputs = clip_features(n, 16)
    held: dict[int, int] = {}

    def hold(x: Tensor) -> Tensor:
        held[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        contrastive_loss(*inputs, **options)
    return sum(size for pointer, size in held.items() if pointer not in {x.data_ptr() for x in inputs})


def test_the_budget_is_kept_to() -> None:
    none = kept_bytes({})
    assert none < 16 * 256 * 4
    row = (256 + 16) * 4
    assert kept_bytes({"memory_budget": 100 * 256 * 4}) - none == 100 * row
    assert kept_bytes({"memory_budget": 1 << 30}) - none == 256 * row
    with torch.no_grad():
        assert kept_bytes({"memory_budget": 1 << 30}) == 0


def test_small_problems_are_kept_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of what the other tests run with
    assert kept_bytes({"reduction": "sum"}) > 256 * 256 * 4


@pytest.mark.parametrize("budget", [-1, 1.5, "all"])
def test_what_is_no_budget(budget: Any) -> None:
    with pytest.raises(ValueError, match=r"memory_budget is .*, must be a number of bytes, at least 0"):
        contrastive_loss(*clip_features(4, 4), memory_budget=budget)
