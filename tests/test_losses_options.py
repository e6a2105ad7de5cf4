"""Every option of `contrastive_loss` in one process: against the matrices, by gradcheck, in every implementation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from losses_helpers import OPTIONS, make_problem
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastclip.losses import contrastive_loss
from fastclip.ops.contrastive_loss import implementations
from fastclip.ops.contrastive_loss.sums import group_size, group_sum
from fastclip.testing import clip_features, relative_error, textbook_contrastive_loss, value_and_gradients

DOUBLE, SINGLE = ("reference", "dense"), ("reference", "dense", "cpu")


def able(names: tuple[str, ...], dtype: torch.dtype, n: int, m: int) -> list[str]:
    """Those of the implementations that take such a problem."""
    return [x for x in names if implementations.why_not(x, "cpu", dtype, n, m) is None]


@pytest.mark.parametrize("directions", ["both", "image", "text"])
@pytest.mark.parametrize("grouping", [None, "positive", "ignore"])
def test_every_combination_is_the_textbook_one_in_fp64(directions: str, grouping: str | None) -> None:
    reductions = itertools.cycle(("none", "mean", "sum"))
    sizes = ((9,), (9,)), ((9,), (14,)), ((1,), (1,)), ((1,), (5,)), ((2,), (2,))
    switches = itertools.product(sizes, (False, True), (False, True), (0.0, 0.2), (False, True))
    for (images, texts), has_labels, has_weights, smoothing, normalize in switches:
        if grouping == "ignore" and smoothing:
            continue
        wanted: dict[str, Any] = {"directions": directions, "reduction": next(reductions), "normalize": normalize}
        wanted |= {"label_smoothing": smoothing} | ({"labels": True} if has_labels else {})
        wanted |= {"weights": True} if has_weights else {}
        wanted |= {} if grouping is None else {"group_ids": True, "group_mode": grouping}
        assert_as_the_textbook(make_problem(images, texts), wanted, DOUBLE, torch.float64, 1e-11)


def assert_as_the_textbook(
    problem: Any, wanted: dict[str, Any], impls: tuple[str, ...], dtype: torch.dtype, bound: float
) -> None:
    """The loss and every gradient, relative to the loss's and the gradient's size, and to 1 where those are less."""
    options = problem.options(wanted, rank=0)
    weights = [options["weights"]] if "weights" in options else []
    leaves = [x.detach().to(dtype).requires_grad_() for x in problem.leaves()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = textbook_contrastive_loss(*exact, **options)
    factors = torch.linspace(1, 2, len(truth), dtype=torch.float64) if truth.ndim else torch.ones(())
    exact_grads = torch.autograd.grad((truth * factors).sum(), exact + weights)
    for impl in able(impls, dtype, *(len(x) for x in leaves[:2])):
        loss = contrastive_loss(*leaves, impl=impl, **options)
        grads = torch.autograd.grad((loss * factors.to(loss.dtype)).sum(), leaves + weights)
        for value, other in zip((loss, *grads), (truth, *exact_grads), strict=True):
            assert (value.double() - other).norm() <= bound * (1 + other.norm()), (impl, wanted, problem.images)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("impl", DOUBLE)
def test_gradcheck_fp64(name: str, impl: str) -> None:
    problem = make_problem((4,), (6,), d=3)
    options = problem.options(OPTIONS[name] | {"reduction": "none"}, rank=0)
    weights = (options.pop("weights"),) if "weights" in options else ()

    def loss(*x: Tensor) -> Tensor:
        more = {"weights": x[3]} if weights else {}
        return contrastive_loss(*x[:3], impl=impl, **options, **more)

    assert torch.autograd.gradcheck(loss, (*problem.leaves(), *weights))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    n=st.integers(1, 70),
    extra=st.integers(0, 40),
    d=st.sampled_from((1, 2, 7, 16, 33, 130)),
    seed=st.integers(0, 1 << 16),
    name=st.sampled_from(sorted(OPTIONS)),
)
def test_any_shape_and_option_in_fp32(n: int, extra: int, d: int, seed: int, name: str) -> None:
    problem = make_problem((n,), (n + extra,), d=d, seed=seed)
    assert_as_the_textbook(problem, OPTIONS[name], SINGLE, torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_error_budget_of_every_option(name: str, dtype: torch.dtype) -> None:
    """Twice eager code's error in the same type, as the matrices make it, on 16-bit values that both are given."""
    problem = make_problem((60,), (90,), d=32)._replace(scale=torch.tensor(100.0).double())
    options = problem.options(OPTIONS[name], rank=0)
    options["weights"] = problem.weights.float()
    inputs = [x.detach().to(dtype) for x in problem.leaves()[:2]] + [torch.tensor(100.0)]
    exact_options = options | {"weights": problem.weights.float().double()}

    def total(loss: Any, given: dict[str, Any]) -> Any:
        return lambda *x: loss(*x, **given).sum()

    exact = value_and_gradients(total(textbook_contrastive_loss, exact_options), inputs, torch.float64)
    low = options | {"weights": problem.weights.to(dtype)}
    eager = value_and_gradients(lambda i, t, s: total(textbook_contrastive_loss, low)(i, t, s.to(dtype)), inputs)
    for impl in able(SINGLE, dtype, 60, 90):
        results = value_and_gradients(total(contrastive_loss, options | {"impl": impl}), inputs)
        for value, plain, truth in zip(results, eager, exact, strict=True):
            error, allowed = ((x - truth).norm().item() for x in (value, plain))
            assert error <= 2 * allowed + 1e-6 * (1 + truth.norm().item()), (impl, error, allowed)


@pytest.mark.parametrize("impl", SINGLE)
def test_lone_members_of_groups_stay_exact(impl: str) -> None:
    """A converged batch, loss 1e-19: no group has a second member, and no weight changes that."""
    inputs = clip_features(16, 64, kind="converged", scale=60.0)
    options = {"group_ids": torch.randperm(16), "weights": torch.linspace(0.5, 1, 16)}
    if impl not in able(SINGLE, torch.float32, 16, 16):
        return
    results = value_and_gradients(lambda *x: contrastive_loss(*x, impl=impl, **options), inputs)
    image, text, scale = (x.detach().double().requires_grad_() for x in inputs)
    logits = scale * image @ text.T
    gaps = (logits - logits.diagonal()[:, None]).exp().masked_fill(torch.eye(16, dtype=torch.bool), 0)
    back = (logits.T - logits.diagonal()[:, None]).exp().masked_fill(torch.eye(16, dtype=torch.bool), 0)
    weights = options["weights"].double()
    exact = ((gaps.sum(1).log1p() + back.sum(1).log1p()) / 2 * weights).sum() / weights.sum()
    truth = (exact, *torch.autograd.grad(exact, (image, text, scale)))
    assert 0 < exact < 1e-12
    assert all(relative_error(value, other.detach()) < 1e-4 for value, other in zip(results, truth, strict=True))


def test_ignored_duplicates_are_no_negatives() -> None:
    """Three copies of every pair: each is left with the copies of the other pairs, three of each."""
    image, text, scale = clip_features(8, 16, dtype=torch.float64)
    copies = [x.detach().repeat(3, 1) for x in (image, text)]
    loss = contrastive_loss(*copies, scale, group_ids=torch.arange(8).repeat(3), group_mode="ignore")
    three_of_each = torch.full((8, 8), 3.0).double().log().fill_diagonal_(0)
    logits, labels = scale * image @ text.T + three_of_each, torch.arange(8)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(loss, expected)


def test_group_sums_by_counting() -> None:
    x, ids, queries = torch.randn(40, 3), torch.randint(-3, 9, (40,)), torch.randint(-5, 12, (25,))
    expected = torch.stack([x[ids == query].sum(0) for query in queries])
    torch.testing.assert_close(group_sum(x, ids, queries), expected)
    assert torch.equal(group_size(ids, queries), torch.stack([(ids == query).sum() for query in queries]))
    torch.testing.assert_close(group_sum(x, None, None), x.sum(0, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalising_inside_is_more_exact_than_before(dtype: torch.dtype) -> None:
    """Features of any length: within 2.5e-3 as returned (rounding alone is 1.7e-3), 1e-5 in fp32."""
    raw = [7 * torch.randn(128, 48), torch.randn(128, 48) / 9, torch.tensor(20.0)]
    raw[1] += raw[0] / 100
    inputs = [raw[0].to(dtype), raw[1].to(dtype), raw[2]]
    exact = value_and_gradients(lambda *x: textbook_contrastive_loss(*x, normalize=True), inputs, torch.float64)
    for impl in able(SINGLE, torch.float32, 128, 128):
        results = value_and_gradients(lambda *x, impl=impl: contrastive_loss(*x, normalize=True, impl=impl), inputs)
        bound = {torch.float32: 4e-6, torch.bfloat16: 2.5e-3, torch.float16: 1e-3}[dtype]
        assert relative_error(results[0], exact[0]) < 1e-6
        for value, truth in zip(results[1:], exact[1:], strict=True):
            assert relative_error(value, truth) < bound


def test_zero_vectors_are_finite_when_normalised() -> None:
    image, text, scale = clip_features(6, 4, dtype=torch.float16)
    image, text = ((5 * x.detach()).index_fill(0, torch.tensor(2), 0).requires_grad_() for x in (image, text))
    loss = contrastive_loss(image, text, scale, normalize=True)
    grads = torch.autograd.grad(loss, (image, text, scale))
    assert all(x.isfinite().all() for x in (loss, *grads))
    assert not grads[0][2].any()
    assert grads[0][1].any()


def test_normalising_keeps_no_copy() -> None:
    n, d = 3000, 40
    image, text, scale = clip_features(n, d)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.arange(n) // 2
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        contrastive_loss(image, text, scale, normalize=True, group_ids=ids, label_smoothing=0.1, weights=torch.ones(n))
    assert 0 < sum(kept.values()) <= 4 * n * (2 * d + 40)


@pytest.mark.parametrize("name", ["plain", "positive", "ignore", "everything"])
def test_bitwise_deterministic(name: str) -> None:
    problem = make_problem((300,), (400,), d=24)
    options = problem.options(OPTIONS[name], rank=0)
    leaves = [x.float() for x in problem.leaves()]
    runs = [value_and_gradients(lambda *x: contrastive_loss(*x, **options).sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["plain", "labels", "ignore", "everything"])
def test_autocast_does_not_reach_inside(name: str) -> None:
    problem = make_problem((30,), (40,), d=24)
    options = problem.options(OPTIONS[name], rank=0)
    leaves = [x.float() for x in problem.leaves()]
    plain = value_and_gradients(lambda *x: contrastive_loss(*x, **options).sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_gradients(lambda *x: contrastive_loss(*x, **options).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("name", ["labels", "weights, none", "positive", "ignore", "everything"])
def test_compiles_to_one_graph_for_every_batch_size(name: str) -> None:
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(lambda *x, **o: contrastive_loss(*x, **o).sum(), backend=frames, fullgraph=True, dynamic=True)
    for n in (32, 48, 80):
        problem = make_problem((n,), (n + 7,))
        options = problem.options(OPTIONS[name], rank=0)
        leaves = [x.float() for x in problem.leaves()]
        plain = value_and_gradients(lambda *x, o=options: contrastive_loss(*x, **o).sum(), leaves)
        compiled = value_and_gradients(lambda *x, o=options: loss(*x, **o), leaves)
        assert all(relative_error(value, truth) < 1e-5 for value, truth in zip(compiled, plain, strict=True))
    graphs = [graph for graph in frames.graphs if any(node.op == "call_function" for node in graph.graph.nodes)]
    assert len(graphs) == 1


@pytest.mark.parametrize("impl", SINGLE)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_not_hidden(value: float, impl: str) -> None:
    if impl not in able(SINGLE, torch.float32, 6, 6):
        return
    for which in (0, 1):
        features = [x.detach() for x in clip_features(6, 4)]
        features[which][3, 2] = value
        assert not contrastive_loss(*features, impl=impl).isfinite()


BAD_VALUES: dict[str, dict[str, Any]] = {
    "labels beyond": {"labels": torch.tensor([0, 1, 9])},
    "labels below": {"labels": torch.tensor([0, 1, -1])},
    "labels twice": {"labels": torch.tensor([0, 1, 1])},
    "ids": {"group_ids": (torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))},
    "weights": {"weights": torch.tensor([1.0, -1.0, 1.0])},
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_that_nobody_looks_at_make_the_loss_nan(name: str) -> None:
    """A compiled graph, like a GPU, does not wait to look."""
    torch._dynamo.reset()
    loss = torch.compile(lambda *x: contrastive_loss(*x, **BAD_VALUES[name]), backend="aot_eager", fullgraph=True)
    inputs = clip_features(3, 4)
    value, *grads = value_and_gradients(loss, inputs)
    assert value.isnan()
    assert all(grad.isnan().all() for grad in grads)
