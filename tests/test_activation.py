"""The activations: the specification against its formula, every implementation against it in fp64, edges."""

from __future__ import annotations

import math

import pytest
import torch
from block_ops_helpers import FAST, TYPES, needs_cpu_kernels, on_its_device  # noqa: F401
from offline_helpers import assert_compiles
from torch import Tensor

from fastclip.ops.activation import KINDS, activation, explain
from fastclip.testing import assert_within_budget, value_and_gradients

pytestmark = pytest.mark.usefixtures("on_its_device")


def by_hand(z: float, kind: str) -> float:
    if kind == "gelu":
        return z * 0.5 * (1 + math.erf(z / math.sqrt(2)))
    if kind == "gelu_tanh":
        return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return z / (1 + math.exp(-1.702 * z))


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_formula(kind: str) -> None:
    x, bias = torch.linspace(-6, 6, 25, dtype=torch.float64), torch.full((25,), 0.125, dtype=torch.float64)
    expected = torch.tensor([by_hand(z + 0.125, kind) for z in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(activation(x, bias, kind=kind), expected, rtol=1e-12, atol=1e-14)
    leaves = (x.clone().requires_grad_(), bias.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda *y: activation(*y, kind=kind), leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("impl", "dtype"), TYPES)
@pytest.mark.parametrize("shape", [(3, 5, 64), (70, 33), (1, 1)])
def test_forward_and_backward(impl: str, dtype: torch.dtype, kind: str, shape: tuple[int, ...]) -> None:
    x, bias, weight = (torch.randn(s).to(dtype) for s in (shape, shape[-1:], shape))
    x *= 3

    def loss(x: Tensor, bias: Tensor, impl: str) -> Tensor:
        return (activation(x, bias, kind=kind, impl=impl).double() * weight.double()).sum()

    exact = value_and_gradients(lambda *y: loss(*y, "reference"), (x, bias), torch.float64)
    eager = value_and_gradients(lambda *y: loss(*y, "reference"), (x, bias))
    ours = value_and_gradients(lambda *y: loss(*y, impl), (x, bias))
    units = {name: y.norm().item() for name, y in zip(("d_x", "d_bias"), exact[1:], strict=True)}
    assert_within_budget(ours[1:], eager[1:], exact[1:], units)
    cases = ((x, bias, impl), (x, bias, "reference"), (x.double(), bias.double(), "reference"))
    out, plain, truth = (activation(y, shift, kind=kind, impl=i).double() for y, shift, i in cases)
    assert_within_budget((out,), (plain,), (truth,), {"out": truth.norm().item()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", FAST)
def test_far_from_zero(impl: str, kind: str) -> None:
    """The tails: 0 on one side, x on the other, slopes 0 and 1; a NaN stays one."""
    x = torch.tensor([-1e4, -30.0, 30.0, 1e4, float("nan")], requires_grad=True)
    out = activation(x, kind=kind, impl=impl)
    (slope,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out[:4], torch.tensor([0.0, 0.0, 30.0, 1e4]), rtol=0, atol=1e-6)
    torch.testing.assert_close(slope[:4], torch.tensor([0.0, 0.0, 1.0, 1.0]), rtol=0, atol=1e-6)
    assert out[4].isnan()


@pytest.mark.parametrize("impl", FAST)
def test_without_bias_strided_and_empty(impl: str) -> None:
    x = torch.randn(6, 40).T.requires_grad_()
    ours, plain = (
        value_and_gradients(lambda y, i=i: activation(y, impl=i).square().sum(), (x,)) for i in (impl, "auto")
    )
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-5, atol=1e-6)
    nothing = torch.zeros(0, 8, requires_grad=True)
    activation(nothing, impl=impl).sum().backward()
    assert nothing.grad.shape == (0, 8)


@pytest.mark.parametrize("impl", FAST)
def test_bitwise_the_same_for_any_number_of_threads(impl: str) -> None:
    x, bias = torch.randn(300, 48, requires_grad=True), torch.randn(48, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.autograd.grad(activation(x, bias, impl=impl).square().sum(), (x, bias)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", FAST)
def test_registration_and_one_graph(impl: str) -> None:
    x, bias = torch.randn(4, 32), torch.randn(32)
    torch.library.opcheck(torch.ops.fastclip.activation_fwd.default, (x, bias, "gelu", impl))
    torch.library.opcheck(torch.ops.fastclip.activation_bwd.default, (x, x, None, "quick_gelu", impl))
    compiled = torch.compile(
        lambda y: activation(y, bias, impl=impl).square().sum(), fullgraph=True, backend="aot_eager"
    )
    ours, plain = (value_and_gradients(f, (x,)) for f in (compiled, lambda y: activation(y, bias).square().sum()))
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-5, atol=1e-6)


@needs_cpu_kernels
def test_backward_keeps_the_input_alone() -> None:
    x, kept = torch.randn(8, 16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        activation(x, kind="quick_gelu", impl="cpu")
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: activation(torch.zeros(2, 3), kind="relu"),
            "kind is 'relu', must be one of gelu, gelu_tanh, quick_gelu",
        ),
        (
            lambda: activation(torch.zeros(2, 3), torch.zeros(2)),
            r"bias must be \(3,\) on cpu like x, was \(2,\) on cpu",
        ),
        (lambda: activation(torch.zeros(2, 3).int()), r"x must be \(..., W\) of a float dtype"),
        (lambda: activation(torch.zeros(2, 3).double(), impl="cpu"), "cannot run: it takes float32 and bfloat16"),
        (lambda: activation(torch.zeros(2, 3), impl="apex"), "impl is 'apex', must be one of"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@needs_cpu_kernels
def test_what_is_taken() -> None:
    for dtype, kind, impl in (
        (torch.bfloat16, "quick_gelu", "cpu"),
        (torch.float32, "gelu_tanh", "cpu"),
        (torch.float32, "gelu", "reference"),
        (torch.float64, "quick_gelu", "reference"),
    ):
        assert [v.impl for v in explain("cpu", dtype, kind) if v.chosen] == [impl]
    assert [v.impl for v in explain("cuda", torch.bfloat16, "quick_gelu") if v.chosen] == ["triton"]
    assert [v.impl for v in explain("cuda", torch.bfloat16, "gelu") if v.chosen] == ["reference"]


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability: int) -> None:
    assert assert_compiles(capability, "activation.triton")
