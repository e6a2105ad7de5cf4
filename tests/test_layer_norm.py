"""LayerNorm with a residual: the specification against its formula, every implementation against it in fp64, edges."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from block_ops_helpers import FAST, TYPES, needs_cpu_kernels, on_its_device  # noqa: F401
from offline_helpers import assert_compiles
from torch import Tensor

from fastclip.ops import _dispatch
from fastclip.ops.layer_norm import apex, explain, layer_norm, reference
from fastclip.testing import assert_within_budget, value_and_gradients

pytestmark = pytest.mark.usefixtures("on_its_device")


def inputs(shape: tuple[int, ...], dtype: torch.dtype, with_residual: bool, weights: torch.dtype | None = None):
    """x, weight, bias and, if wanted, a residual far from zero, as a residual stream is."""
    x, residual = torch.randn(shape).to(dtype), (5 * torch.randn(shape) + 3).to(dtype)
    weight, bias = ((torch.randn(shape[-1:]) + 1).to(weights or dtype) for _ in range(2))
    return (x, weight, bias, residual) if with_residual else (x, weight, bias)


def test_reference_is_the_formula() -> None:
    x, weight, bias, residual = (y.requires_grad_() for y in inputs((3, 7), torch.float64, True))
    out, total = reference.layer_norm(x, weight, bias, residual, 1e-3)
    centred = x + residual - (x + residual).mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(total, x + residual)
    assert layer_norm(x, weight, bias)[1] is x
    assert torch.autograd.gradcheck(lambda *y: layer_norm(*y), (x, weight, bias, residual))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("impl", "dtype"), TYPES)
@pytest.mark.parametrize("shape", [(2, 9, 64), (70, 33), (1, 1), (3, 768)])
def test_forward_and_backward(impl: str, dtype: torch.dtype, with_residual: bool, shape: tuple[int, ...]) -> None:
    leaves = inputs(shape, dtype, with_residual)
    for_out, for_total = (torch.randn(shape, dtype=torch.float64) for _ in range(2))

    def loss(*leaves: Tensor, impl: str) -> Tensor:
        out, total = layer_norm(*leaves, impl=impl)
        return (out.double() * for_out).sum() + (total.double() * for_total).sum()

    exact = value_and_gradients(lambda *y: loss(*y, impl="reference"), leaves, torch.float64)
    eager = value_and_gradients(lambda *y: loss(*y, impl="reference"), leaves)
    ours = value_and_gradients(lambda *y: loss(*y, impl=impl), leaves)
    names = ("d_x", "d_weight", "d_bias", "d_residual")
    units = {name: y.norm().item() for name, y in zip(names, exact[1:], strict=False)}
    assert_within_budget(
        ours[1:], eager[1:], exact[1:], units, torch.finfo(dtype).eps if dtype != torch.float32 else 5e-7
    )
    results, plain = (layer_norm(*leaves, impl=i) for i in (impl, "reference"))
    truth = layer_norm(*(y.double() for y in leaves))
    values = [[y.double() for y in pair] for pair in (results, plain, truth)]
    assert_within_budget(*values, {name: y.norm().item() for name, y in zip(("out", "total"), values[2], strict=True)})
    assert all(y.dtype == dtype for y in results)


@pytest.mark.parametrize("impl", FAST)
def test_a_stream_of_bfloat16_with_weights_in_float32(impl: str) -> None:
    leaves = inputs((5, 48), torch.bfloat16, True, weights=torch.float32)
    leaves = tuple(y.requires_grad_() for y in leaves)
    out, total = layer_norm(*leaves, impl=impl)
    plain, _ = layer_norm(*leaves, impl="reference")
    torch.testing.assert_close(out, plain, rtol=1e-2, atol=1e-2)
    gradients = torch.autograd.grad(out.float().sum() + total.float().sum(), leaves)
    assert [g.dtype for g in gradients] == [y.dtype for y in leaves]
    assert torch.equal(gradients[0], gradients[3])  # x and residual


@pytest.mark.parametrize("impl", FAST)
def test_a_large_mean_does_not_eat_the_variance(impl: str) -> None:
    x, weight, bias = 1e4 + torch.randn(4, 256), torch.ones(256), torch.zeros(256)
    ours, truth = layer_norm(x, weight, bias, impl=impl)[0], layer_norm(x.double(), weight.double(), bias.double())[0]
    assert (ours - truth).abs().max() < 2e-3


@pytest.mark.parametrize("impl", FAST)
def test_strided_and_empty(impl: str) -> None:
    x, weight, bias = inputs((40, 6), torch.float32, False)
    x, weight, bias = x.T.requires_grad_(), torch.ones(40), torch.zeros(40)
    ours, plain = (
        value_and_gradients(lambda y, i=i: layer_norm(y, weight, bias, impl=i)[0].pow(3).sum(), (x,))
        for i in (impl, "auto")
    )
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-4, atol=1e-5)
    nothing = torch.zeros(0, 40, requires_grad=True)
    layer_norm(nothing, weight, bias, nothing, impl=impl)[0].sum().backward()
    assert nothing.grad.shape == (0, 40)


@pytest.mark.parametrize("impl", FAST)
def test_bitwise_the_same_for_any_number_of_threads(impl: str) -> None:
    leaves = [y.requires_grad_() for y in inputs((300, 48), torch.float32, True)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.autograd.grad(layer_norm(*leaves, impl=impl)[0].pow(3).sum(), leaves))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", FAST)
def test_registration_and_one_graph(impl: str) -> None:
    x, weight, bias, residual = inputs((4, 32), torch.float32, True)
    ops = torch.ops.fastclip
    for given in (residual, None):
        torch.library.opcheck(ops.layer_norm_fwd.default, (x, given, weight, bias, 1e-5, impl))
    _, total, mean, rstd = ops.layer_norm_fwd(x, residual, weight, bias, 1e-5, impl)
    for given in (x, None):
        torch.library.opcheck(ops.layer_norm_bwd.default, (x, given, total, weight, mean, rstd, impl))

    def loss(*leaves: Tensor) -> Tensor:
        out, total = layer_norm(*leaves, impl=impl)
        return out.pow(3).sum() + total.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, plain = (value_and_gradients(f, (x, weight, bias, residual)) for f in (compiled, loss))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@needs_cpu_kernels
def test_backward_keeps_the_sum_and_two_numbers_a_row() -> None:
    x, weight, bias, residual = (y.requires_grad_() for y in inputs((8, 64), torch.float32, True))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, total = layer_norm(x, weight, bias, residual, impl="cpu")
    assert [t.data_ptr() for t in kept[:2]] == [total.data_ptr(), weight.data_ptr()]
    assert [t.numel() for t in kept[2:]] == [8, 8]


@pytest.mark.parametrize("weights", [torch.float16, torch.float32])
def test_apex_is_called_with_its_own_arguments(monkeypatch, weights: torch.dtype) -> None:
    """It has no CPU path: what is checked is what we ask of it, with its signatures on PyTorch's LayerNorm."""

    def same_dtype(x: Tensor, weight: Tensor, bias: Tensor, normalized_shape, eps: float = 1e-6) -> Tensor:
        assert x.dtype == weight.dtype
        return torch.nn.functional.layer_norm(x, normalized_shape, weight, bias, eps)

    def mixed_dtype(x: Tensor, weight: Tensor, bias: Tensor, normalized_shape, eps: float = 1e-6) -> Tensor:
        return torch.nn.functional.layer_norm(x.to(weight.dtype), normalized_shape, weight, bias, eps)

    names = ("apex", "apex.normalization", "apex.normalization.fused_layer_norm")
    modules = [types.ModuleType(name) for name in names]
    modules[2].fused_layer_norm_affine, modules[2].mixed_dtype_fused_layer_norm_affine = same_dtype, mixed_dtype
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    leaves = inputs((3, 16), torch.float16, True, weights=weights)
    ours, plain = apex.layer_norm(*leaves, 1e-5), reference.layer_norm(*leaves, 1e-5)
    assert ours[0].dtype == torch.float16
    torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-2)


@needs_cpu_kernels
def test_says_why_an_implementation_is_not_taken(monkeypatch) -> None:
    x, weight = torch.zeros(2, 3), torch.ones(3)
    with pytest.raises(ValueError, match="layer_norm: impl='apex' cannot run: the package apex is not installed"):
        layer_norm(x, weight, weight, impl="apex")
    monkeypatch.setattr(_dispatch, "has_package", lambda name: True)
    reasons = {v.impl: v.reason for v in explain("cpu", torch.float32)}
    assert reasons["reference"] == "first that can run"
    assert reasons["cpu"] == "auto prefers reference here"
    assert [v.impl for v in explain("cpu", torch.bfloat16) if v.chosen] == ["cpu"]
    assert [v.impl for v in explain("cpu", torch.bfloat16, has_residual=False) if v.chosen] == ["reference"]
    assert "CUDA devices only" in reasons["apex"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: layer_norm(torch.zeros(2, 3), torch.ones(2), torch.ones(3)),
            r"weight must be \(3,\) on cpu like x, was \(2,\)",
        ),
        (lambda: layer_norm(torch.zeros(2, 3), torch.ones(3), torch.ones(3, 1)), r"bias must be \(3,\) on cpu"),
        (lambda: layer_norm(torch.zeros(2, 3), *2 * [torch.ones(3)], torch.zeros(1, 3)), r"residual must be \(2, 3\)"),
        (
            lambda: layer_norm(torch.zeros(2, 3), *2 * [torch.ones(3)], torch.zeros(2, 3).half()),
            "was .* of torch.float16",
        ),
        (lambda: layer_norm(torch.zeros(2, 3).int(), *2 * [torch.ones(3)]), "x must be"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability: int) -> None:
    assert assert_compiles(capability, "layer_norm.triton")
