"""The C++ attention kernel against the specification in fp64: both directions, dense, packed and pooled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastclip.ops import _extension
from fastclip.ops.attention import attention, explain, pooled_attention, reference
from fastclip.testing import assert_within_budget, relative_error, value_and_gradients

pytestmark = pytest.mark.skipif(_extension.load() is not None, reason=f"compiled kernels: {_extension.load()}")

# whole vectors of 16, one more and one less, one token, an empty sequence, CLIP's text, a class token beyond a tile
CASES = [((16, 16), 64), ((15, 17, 1), 64), ((0, 3, 0), 40), ((77, 5), 80), ((257,), 88), ((50, 49), 104), ((2, 1), 7)]


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).int()


def norms(values: tuple[Tensor, ...], *names: str) -> dict[str, float]:
    return {name: value.norm().item() for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "head_dim"), CASES)
def test_packed_forward_and_backward(lengths: tuple[int, ...], head_dim: int, dtype: torch.dtype, causal: bool) -> None:
    cu_seqlens = bounds(lengths)
    qkv, weight = torch.randn(sum(lengths), 3, 2, head_dim).to(dtype), torch.randn(sum(lengths), 2, head_dim).to(dtype)

    def loss(x: Tensor, impl: str) -> Tensor:
        out = attention(x, cu_seqlens, max(lengths), causal=causal, impl=impl)
        return (out * weight.to(out.dtype)).sum(dtype=torch.promote_types(out.dtype, torch.float32))

    exact = value_and_gradients(lambda x: loss(x, "reference"), (qkv,), torch.float64)
    eager = value_and_gradients(lambda x: loss(x, "reference"), (qkv,))
    ours = value_and_gradients(lambda x: loss(x, "cpu"), (qkv,))
    assert_within_budget(ours[1:], eager[1:], exact[1:], norms(exact[1:], "d_qkv"), torch.finfo(dtype).eps)
    truth, out, plain = (
        attention(x, cu_seqlens, max(lengths), causal=causal, impl=impl).double()
        for x, impl in ((qkv.double(), "reference"), (qkv, "cpu"), (qkv, "reference"))
    )
    assert_within_budget((out,), (plain,), (truth,), norms((truth,), "out"), torch.finfo(dtype).eps)


HEAD_DIMS = (64, 72, 80, 88, 104, 112, 128)


def check_length(length: int, head_dim: int, causal: bool) -> None:
    qkv, weight = torch.randn(1, length, 3, 1, head_dim), torch.randn(1, length, 1, head_dim)
    exact, ours = (
        value_and_gradients(lambda x, i=impl: (attention(x, causal=causal, impl=i) * weight).sum(), (qkv.to(dtype),))
        for impl, dtype in (("reference", torch.float64), ("cpu", torch.float32))
    )
    assert relative_error(ours[1], exact[1]) < 2e-6, (length, head_dim, causal)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_lengths_and_head_dims(head_dim: int) -> None:
    for length in (1, 2, 31, 64, 129, 192, 320):
        check_length(length, head_dim, length % 2 == 0)


@pytest.mark.long
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_length(head_dim: int) -> None:
    for length in range(1, 601):
        check_length(length, head_dim, length % 2 == 0)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65])
def test_dense_equals_packed(length: int) -> None:
    qkv = torch.randn(3, length, 3, 2, 32)
    dense = attention(qkv, impl="cpu")
    packed = attention(qkv.flatten(0, 1), bounds((length,) * 3), length, impl="cpu")
    assert torch.equal(dense.flatten(0, 1), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(5, 1, 33), (16,)])
def test_pooled_forward_and_backward(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    cu_seqlens = bounds(lengths)
    q, kv = torch.randn(len(lengths), 2, 24).to(dtype), torch.randn(sum(lengths), 2, 2, 24).to(dtype)
    weight = torch.randn_like(q)

    def loss(q: Tensor, kv: Tensor, impl: str) -> Tensor:
        out = pooled_attention(q, kv, cu_seqlens, max(lengths), impl=impl)
        return (out * weight.to(out.dtype)).sum(dtype=torch.promote_types(out.dtype, torch.float32))

    exact = value_and_gradients(lambda a, b: loss(a, b, "reference"), (q, kv), torch.float64)
    eager = value_and_gradients(lambda a, b: loss(a, b, "reference"), (q, kv))
    ours = value_and_gradients(lambda a, b: loss(a, b, "cpu"), (q, kv))
    assert_within_budget(ours[1:], eager[1:], exact[1:], norms(exact[1:], "d_q", "d_kv"), torch.finfo(dtype).eps)


def test_extreme_scores_stay_finite() -> None:
    qkv = torch.randn(40, 3, 2, 64) * 100
    out = attention(qkv, bounds((40,)), 40, causal=True, impl="cpu")
    truth = reference.attention(qkv.double(), bounds((40,)), 40, causal=True)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), truth, rtol=1e-3, atol=1e-2)


def test_bitwise_the_same_for_any_number_of_threads() -> None:
    qkv = torch.randn(30, 3, 4, 64, requires_grad=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = attention(qkv, bounds((7, 23)), 23, impl="cpu")
            results.append((out.detach(), torch.autograd.grad(out.square().sum(), qkv)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_registration(packed: bool) -> None:
    where = (bounds((4, 5)), 5) if packed else (None, 3)
    qkv, q, kv = torch.randn(9, 3, 2, 16), torch.randn(2 if packed else 3, 2, 16), torch.randn(9, 2, 2, 16)
    ops = torch.ops.fastclip
    torch.library.opcheck(ops.attention_fwd.default, (qkv, *where, True, 0.25, "cpu"))
    torch.library.opcheck(ops.attention_bwd.default, (qkv[:, 0], qkv, None, None, *where, True, 0.25, "cpu"))
    torch.library.opcheck(ops.pooled_attention_fwd.default, (q, kv, *where, 0.25, "cpu"))
    torch.library.opcheck(ops.pooled_attention_bwd.default, (q, q, kv, *where, 0.25, "cpu"))


def test_compiles_into_one_graph() -> None:
    def loss(qkv: Tensor) -> Tensor:
        return attention(qkv, impl="cpu").square().sum()

    qkv = torch.randn(2, 9, 3, 2, 16, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, eager = (torch.autograd.grad(f(qkv), qkv)[0] for f in (compiled, loss))
    torch.testing.assert_close(ours, eager)


def test_one_graph_serves_every_size() -> None:
    graphs = 0

    def count(module: torch.fx.GraphModule, _: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    def causal(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return attention(x, cu_seqlens, 9, causal=True)

    compiled = torch.compile(causal, fullgraph=True, dynamic=True, backend=count)
    for lengths in ((9, 4, 1, 1, 2), (7, 1, 2), (3, 3, 3, 3)):  # sizes that are equal at first are taken for one
        qkv = torch.randn(sum(lengths), 3, 2, 16)
        ours = compiled(qkv, bounds(lengths))
        torch.testing.assert_close(ours, attention(qkv, bounds(lengths), 9, causal=True, impl="reference"))
    assert graphs == 1


def test_wrong_bounds_never_reach_the_kernel() -> None:
    for cu_seqlens in (bounds((4, 6)), bounds((4, 4)), bounds((9,)), torch.tensor([0, 7, 2, 9]).int()):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 9 in steps of 0 to max_seqlen = 5"):
            torch.ops.fastclip.attention_fwd(torch.randn(9, 3, 2, 16), cu_seqlens, 5, False, 0.25, "cpu")


def test_says_why_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="impl='cpu' cannot run: it takes float32 and bfloat16"):
        attention(torch.randn(1, 4, 3, 1, 8, dtype=torch.float64), impl="cpu")
    assert [v.impl for v in explain("cpu", torch.bfloat16, 50) if v.chosen] == ["cpu"]
    assert [v.impl for v in explain("cpu", torch.bfloat16, 577) if v.chosen] == ["sdpa"]
    assert [v.impl for v in explain("cpu", torch.float32, 50) if v.chosen] == ["sdpa"]
    assert [v.impl for v in explain("cpu", torch.float32, 50, is_packed=True) if v.chosen] == ["cpu"]
