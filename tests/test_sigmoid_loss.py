"""The sigmoid loss: every implementation against fp64, its registration, its memory and its edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sigmoid_loss_helpers import (
    KINDS,
    NAMES,
    eager_sigmoid_loss,
    exact_sigmoid_loss,
    exact_sigmoid_rows,
    sigmoid_inputs,
    sigmoid_loss_units,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastclip.losses import sigmoid_loss
from fastclip.ops import _extension
from fastclip.ops.sigmoid_loss import explain, implementations, reference, sigmoid_rows, sigmoid_sum
from fastclip.testing import assert_within_budget, relative_error, value_and_gradients

CPU = pytest.param("cpu", marks=pytest.mark.skipif(_extension.load() is not None, reason="csrc"))
IMPLS = ("reference", "dense", CPU)


def results_of(inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    return value_and_gradients(lambda *x: sigmoid_loss(*x, **options), inputs)


def groups(n: int, many: int = 5) -> Tensor:
    return torch.arange(n) * 7 % many


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grouped", [False, True])
def test_reference_is_exact_in_fp64(kind: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 7 * 33)  # several chunks
    inputs = sigmoid_inputs(33, 24, kind=kind, dtype=torch.float64)
    ids = groups(33) if grouped else None
    results = results_of(inputs, impl="reference", group_ids=ids)
    exact = value_and_gradients(lambda *x: exact_sigmoid_loss(*x, ids), inputs)
    for name, value, truth in zip(NAMES, results, exact, strict=True):
        assert relative_error(value, truth) < 1e-13, name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [1, 4])
def test_gradcheck_fp64(reduction: str, n: int) -> None:
    inputs = sigmoid_inputs(n, 3, scale=4.0, bias=-1.0, dtype=torch.float64)
    weights = torch.linspace(0.5, 2, n, dtype=torch.float64, requires_grad=True)

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
        options = {"reduction": reduction, "weights": weights, "group_ids": groups(n, 3), "normalize": True}
        return sigmoid_loss(image, text, scale, bias, impl="reference", **options)

    assert torch.autograd.gradcheck(loss, (*inputs, weights))


@pytest.mark.parametrize("impl", IMPLS)
def test_reductions_and_weights(impl: str) -> None:
    inputs, weights = sigmoid_inputs(20, 8, dtype=torch.float32), torch.linspace(-1, 2, 20)
    rows = weights * exact_sigmoid_rows(*(x.detach() for x in inputs))
    for reduction, expected in (("none", rows), ("sum", rows.sum()), ("mean", rows.sum() / 20)):
        loss = sigmoid_loss(*inputs, weights=weights, reduction=reduction, impl=impl)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(sigmoid_loss(*inputs, impl=impl), sigmoid_loss(*inputs, weights=torch.ones(20), impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_is_the_same_by_rows(impl: str) -> None:
    """ "none" makes the logits again in backward; the other two made the gradient in forward."""
    inputs, weights = sigmoid_inputs(70, 16, dtype=torch.float32), torch.linspace(-1, 2, 70)
    by_rows = value_and_gradients(lambda *x: (weights * sigmoid_loss(*x, reduction="none", impl=impl)).sum(), inputs)
    at_once = results_of(inputs, weights=weights, reduction="sum", impl=impl)
    for name, a, b in zip(NAMES, by_rows, at_once, strict=True):
        assert relative_error(a, b) < 2e-6, name


def test_loss_alone_is_the_loss_with_its_gradient() -> None:
    inputs = sigmoid_inputs(70, 16, dtype=torch.float32)
    with torch.no_grad():
        alone = sigmoid_loss(*inputs)
    assert not alone.requires_grad
    assert torch.equal(alone, sigmoid_loss(*inputs).detach())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("either_way")
def test_error_budget(impl: str, dtype: torch.dtype, kind: str) -> None:
    for n, d, scale, grouped in ((67, 33, 10.0, False), (130, 64, 100.0, False), (67, 33, 30.0, True)):
        inputs, ids = sigmoid_inputs(n, d, kind=kind, scale=scale, dtype=dtype), groups(n, 9) if grouped else None
        results = results_of(inputs, impl=impl, group_ids=ids)
        eager = value_and_gradients(lambda *x, ids=ids: eager_sigmoid_loss(*x, ids), inputs)
        exact = value_and_gradients(lambda *x, ids=ids: exact_sigmoid_loss(*x, ids), inputs, torch.float64)
        assert all(x.isfinite().all() for x in results)
        assert_within_budget(results, eager, exact, sigmoid_loss_units(inputs, ids))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [10.0, 30.0, 100.0])
@pytest.mark.usefixtures("either_way")
def test_exact_at_siglips_scales(impl: str, scale: float) -> None:
    inputs = sigmoid_inputs(64, 48, kind="clip", scale=scale, dtype=torch.float32)
    exact = value_and_gradients(exact_sigmoid_loss, inputs, torch.float64)
    for name, value, truth in zip(NAMES, results_of(inputs, impl=impl), exact, strict=True):
        assert relative_error(value, truth) < 5e-6, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", [-30.0, -45.0])
def test_converged_pairs_keep_their_relative_accuracy(impl: str, bias: float) -> None:
    """Positives at z = -bias and negatives at z = bias: losses of 1e-13 and 1e-19, where 1 - sigmoid(z) would say 0."""
    image = torch.eye(20).requires_grad_()
    scale, offset = (torch.tensor(x, requires_grad=True) for x in (-2 * bias, bias))
    inputs = (image, image.detach().clone().requires_grad_(), scale, offset)
    exact = value_and_gradients(exact_sigmoid_loss, inputs, torch.float64)
    assert 0 < exact[0] < 1e-11
    for name, value, truth in zip(NAMES, results_of(inputs, impl=impl), exact, strict=True):
        assert relative_error(value, truth) < 2e-6, name


@pytest.mark.parametrize("impl", IMPLS)
def test_huge_logits(impl: str) -> None:
    """Every pair on the wrong side by thousands: the loss is linear there, and nothing overflows."""
    inputs = sigmoid_inputs(9, 4, kind="permuted", scale=1e4, bias=3e3, dtype=torch.float32)
    exact = value_and_gradients(exact_sigmoid_loss, inputs, torch.float64)
    for name, value, truth in zip(NAMES, results_of(inputs, impl=impl), exact, strict=True):
        assert relative_error(value, truth) < 1e-5, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(impl: str, bad: float) -> None:
    inputs = sigmoid_inputs(20, 8, dtype=torch.float32)
    image = inputs[0].detach().clone()
    image[3, 2] = bad
    rows = sigmoid_loss(image, *inputs[1:], reduction="none", impl=impl)
    assert not rows[3].isfinite()
    assert rows[torch.arange(20) != 3].isfinite().all()
    assert sigmoid_loss(*inputs[:2], inputs[2] * torch.nan, inputs[3], impl=impl).isnan()
    assert sigmoid_loss(*inputs[:3], inputs[3] * torch.nan, impl=impl).isnan()
    _, *grads = value_and_gradients(lambda *x: sigmoid_loss(*x, impl=impl), (image, *inputs[1:]))
    assert not all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 7), (2, 1), (3, 7), (17, 513), (63, 8), (130, 40)])
def test_odd_shapes(impl: str, n: int, d: int) -> None:
    inputs = sigmoid_inputs(n, d, dtype=torch.float32)
    exact = value_and_gradients(exact_sigmoid_loss, inputs, torch.float64)
    for name, value, truth in zip(NAMES, results_of(inputs, impl=impl), exact, strict=True):
        assert relative_error(value, truth) < 5e-6, name


@pytest.mark.parametrize("impl", ["reference", "dense"])
def test_fp16(impl: str) -> None:
    inputs = sigmoid_inputs(65, 20, kind="clip", dtype=torch.float16)
    exact = value_and_gradients(exact_sigmoid_loss, inputs, torch.float64)
    for name, value, truth in zip(NAMES, results_of(inputs, impl=impl), exact, strict=True):
        assert relative_error(value, truth) < 5e-4, name  # the gradients are rounded to fp16


def test_fp16_gradients_wait_in_fp32_for_the_loss_scale() -> None:
    """A mean's gradient of 1e-8 is nothing in fp16 before GradScaler's factor comes."""
    image, text = (torch.eye(20, dtype=torch.float16).requires_grad_() for _ in range(2))
    inputs = (image, text, *(torch.tensor(x, requires_grad=True) for x in (40.0, -20.0)))
    scaled = value_and_gradients(lambda *x: sigmoid_loss(*x, impl="reference") * 2**16, inputs)
    exact = value_and_gradients(lambda *x: exact_sigmoid_loss(*x) * 2**16, inputs, torch.float64)
    assert 0 < (exact[1] / 2**16).abs().max() < 2**-25  # half of fp16's smallest number
    assert relative_error(scaled[1], exact[1]) < 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("n", "m", "offset"),
    [(1, 9, 3), (5, 5, 0), (70, 1100, 1030), (1025, 1100, 70)],  # the last two: beyond the CPU kernel's block
)
def test_rectangular_blocks(impl: str, n: int, m: int, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 100 * m)
    image, text, scale, bias = sigmoid_inputs(max(n, m), 48, kind="clip", dtype=torch.float32)
    leaves = tuple(x.detach().requires_grad_() for x in (image[:n], text[:m], scale, bias))
    rows, cols, weights = torch.arange(n) % 6, torch.arange(m) % 7, torch.linspace(-1, 2, n)
    for ids in ((None, None), (rows, cols)):

        def exact(*x: Tensor, ids: tuple[Any, Any] = ids) -> Tensor:
            z = x[2] * x[0] @ x[1].T + x[3]
            own = torch.arange(m) == torch.arange(n)[:, None] + offset
            is_positive = own if ids[0] is None else own | (ids[0][:, None] == ids[1])
            x = torch.where(is_positive, -z, z)
            return torch.logaddexp(torch.zeros_like(x), x).sum(1) @ weights.to(z.dtype)

        truth = value_and_gradients(exact, leaves, torch.float64)
        at_once = value_and_gradients(lambda *x, ids=ids: sigmoid_sum(*x, *ids, offset, weights, impl), leaves)
        by_rows = value_and_gradients(lambda *x, ids=ids: sigmoid_rows(*x, *ids, offset, impl) @ weights, leaves)
        for name, a, b, t in zip(NAMES, at_once, by_rows, truth, strict=True):
            assert relative_error(a, t) < 2e-5, name
            assert relative_error(b, t) < 2e-5, name


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(("reference", "dense", "cpu")), st.integers(1, 6))
def test_any_shape(n: int, d: int, impl: str, many: int) -> None:
    if impl == "cpu" and _extension.load() is not None:
        impl = "auto"
    inputs, ids = sigmoid_inputs(n, d, dtype=torch.float32), groups(n, many)
    exact = value_and_gradients(lambda *x: exact_sigmoid_loss(*x, ids), inputs, torch.float64)
    for name, value, truth in zip(NAMES, results_of(inputs, impl=impl, group_ids=ids), exact, strict=True):
        assert (value - truth).norm() <= 1e-5 * truth.norm() + 1e-6, name


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_are_read_right_and_left_alone(impl: str) -> None:
    image, *others = sigmoid_inputs(40, 24, dtype=torch.float32)
    wide = torch.randn(24, 80)
    wide[:, ::2] = image.detach().T
    strided = wide.T[::2].requires_grad_()
    ids, weights = torch.arange(80)[::2] % 6, torch.rand(40, 2)[:, 0]
    before = [x.detach().clone() for x in (strided, *others, ids, weights)]
    options: dict[str, Any] = {"group_ids": ids, "weights": weights, "impl": impl}
    ours = torch.autograd.grad(sigmoid_loss(strided, *others, **options), (strided, *others))
    plain = torch.autograd.grad(sigmoid_loss(image, *others, **options), (image, *others))
    assert all(relative_error(a.double(), b.double()) < 1e-6 for a, b in zip(ours, plain, strict=True))
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, (strided, *others, ids, weights), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_bitwise_deterministic(impl: str) -> None:
    inputs = sigmoid_inputs(700, 32, dtype=torch.float32)
    runs = [results_of(inputs, impl=impl) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(_extension.load() is not None, reason="csrc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(3, 4096), (1300, 80), (700, 512)])
def test_cpu_kernel_gives_the_same_bits_on_any_number_of_threads(n: int, d: int, dtype: torch.dtype) -> None:
    inputs = sigmoid_inputs(n, d, dtype=dtype)
    first, *others = on_threads(lambda: results_of(inputs, impl="cpu"))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def on_threads(run: Callable[[], Any]) -> list[Any]:
    """run() with one, two and three threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autograd_keeps_no_matrix(reduction: str) -> None:
    n, d = 3000, 4
    inputs = sigmoid_inputs(n, d, dtype=torch.float32)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sigmoid_loss(*inputs, reduction=reduction)
    assert 0 < sum(kept.values()) <= 4 * n * (2 * d + 16)


def test_backward_twice_over_one_graph() -> None:
    inputs = sigmoid_inputs(8, 4, dtype=torch.float32)
    loss = sigmoid_loss(*inputs)
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_are_constants_to_a_second_differentiation() -> None:
    inputs = sigmoid_inputs(4, 3, dtype=torch.float32)
    (grad,) = torch.autograd.grad(sigmoid_loss(*inputs), inputs[:1], create_graph=True)
    assert not grad.requires_grad
    (grad,) = torch.autograd.grad(sigmoid_loss(*inputs).square(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_does_not_reach_inside() -> None:
    inputs = sigmoid_inputs(64, 32, kind="clip", dtype=torch.float32)
    plain = results_of(inputs, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        inside = results_of(inputs, impl="reference")
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("grouped", [False, True])
def test_opcheck(impl: str, grouped: bool) -> None:
    image, text, scale, bias = (x.detach() for x in sigmoid_inputs(9, 5, dtype=torch.bfloat16))
    ids = (torch.arange(6), torch.arange(9)) if grouped else (None, None)
    block = (image[:6], text, scale, bias, *ids, 2)
    torch.library.opcheck(torch.ops.fastclip.sigmoid_loss_fwd.default, (*block, impl))
    torch.library.opcheck(torch.ops.fastclip.sigmoid_loss_fwd_bwd.default, (*block, torch.rand(6), impl))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph_for_every_batch_size(reduction: str) -> None:
    def plain(*x: Tensor) -> Tensor:
        return sigmoid_loss(*x, normalize=True, reduction=reduction).sum()

    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(plain, backend=frames, fullgraph=True, dynamic=True)
    for n in (32, 48, 80):
        inputs = sigmoid_inputs(n, 16, dtype=torch.float32)
        for value, truth in zip(value_and_gradients(loss, inputs), value_and_gradients(plain, inputs), strict=True):
            assert relative_error(value, truth) < 1e-5
    graphs = [graph for graph in frames.graphs if any(node.op == "call_function" for node in graph.graph.nodes)]
    assert len(graphs) == 1


def test_auto_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(device: str, dtype: torch.dtype, n: int) -> str:
        return next(v.impl for v in explain(device, dtype, n) if v.chosen)

    monkeypatch.setattr(_extension, "load", lambda: None)
    assert chosen("cpu", torch.float32, 64) == chosen("cpu", torch.bfloat16, 8192) == "cpu"
    assert chosen("cuda", torch.bfloat16, 256) == chosen("cpu", torch.float64, 64) == "dense"
    assert chosen("cuda", torch.float16, 32768) == "triton"
    assert chosen("cuda", torch.float64, 32768) == chosen("cpu", torch.float64, 8192) == "reference"
    monkeypatch.setattr(_extension, "load", lambda: "not built")
    assert chosen("cpu", torch.float32, 64) == "dense"
    reason = implementations.why_not("dense", "cpu", torch.float32, 1 << 14, 1 << 14)
    assert reason is not None
    assert "16384 x 16384 logits" in reason


IMAGE, TEXT, SCALE, BIAS = (x.detach() for x in sigmoid_inputs(4, 3, dtype=torch.float32))
INPUTS = (IMAGE, TEXT, SCALE, BIAS)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((IMAGE[0], TEXT, SCALE, BIAS), {}, r"image_features has shape \(3,\), must be \(N, D\)"),
        ((IMAGE[:0], TEXT[:0], SCALE, BIAS), {}, r"image_features has shape \(0, 3\)"),
        ((IMAGE, TEXT[:3], SCALE, BIAS), {}, r"text_features has shape \(3, 3\), must be \(4, 3\)"),
        ((IMAGE.long(), TEXT.long(), SCALE, BIAS), {}, r"image_features is torch.int64"),
        ((IMAGE, TEXT.double(), SCALE, BIAS), {}, r"text_features is torch.float64 on cpu, must be torch.float32"),
        ((IMAGE, TEXT, 100.0, BIAS), {}, r"logit_scale is 100.0, must be a tensor"),
        ((IMAGE, TEXT, SCALE, -10.0), {}, r"logit_bias is -10.0, must be a tensor of shape \(\) or \(1,\)"),
        ((IMAGE, TEXT, SCALE, torch.ones(2)), {}, r"logit_bias is a tensor of shape \(2,\)"),
        (INPUTS, {"reduction": "avg"}, r"reduction is 'avg'"),
        (INPUTS, {"group_ids": torch.arange(3)}, r"group_ids has shape \(3,\), must be \(4,\)"),
        (INPUTS, {"group_ids": torch.ones(4)}, r"group_ids is torch.float32, must be an integer type"),
        (INPUTS, {"weights": torch.ones(4, 1)}, r"weights has shape \(4, 1\), must be \(4,\)"),
        (INPUTS, {"weights": torch.arange(4)}, r"weights is torch.int64, must be a floating-point type"),
        (INPUTS, {"weights": torch.ones(4, device="meta")}, r"weights is on meta, must be on cpu"),
        (INPUTS, {"impl": "gpu"}, r"impl is 'gpu', must be one of auto, reference, dense, cpu, triton, cuda"),
        ((IMAGE.double(), TEXT.double(), SCALE, BIAS), {"impl": "cpu"}, r"it takes float32 and bfloat16"),
        ((IMAGE.double(), TEXT.double(), SCALE, BIAS), {"impl": "triton"}, r"it takes float32, bfloat16 and float16"),
        ((IMAGE.log(), TEXT, SCALE, BIAS), {"check_values": True}, r"image_features has values that are not finite"),
        ((IMAGE, TEXT, SCALE, BIAS / 0), {"check_values": True}, r"logit_bias has values that are not finite"),
        (INPUTS, {"weights": torch.ones(4) / 0, "check_values": True}, r"weights has values that are not finite"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(*arguments, **options)
