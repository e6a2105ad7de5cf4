"""The Triton kernels in the interpreter (float32, float16: bfloat16 products are wrong there), and compiled offline."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from offline_helpers import CAPABILITIES, assert_compiles
from torch import Tensor

from fastclip.ops.attention import attention, pooled_attention, reference
from fastclip.testing import assert_within_budget, relative_error, value_and_gradients

DENSE = [(77, 64, True), (197, 64, False), (257, 64, False), (256, 64, False), (150, 80, False)]
HEAD_DIMS = (64, 72, 80, 88, 104, 112, 128)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def triton_kernels() -> ModuleType:
    from fastclip.ops.attention import triton

    if not triton.INTERPRETED and not torch.cuda.is_available():
        pytest.fail("the kernels were imported before TRITON_INTERPRET=1 was set")
    return triton


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def bounds(lengths: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor((0, *lengths), device=device).cumsum(0).int()


def check(
    lengths: tuple[int, ...], head_dim: int, dtype: torch.dtype, causal: bool, device: str, dense=False, heads=1
) -> None:
    """Output and gradient against the specification in fp64."""
    cu_seqlens, longest = bounds(lengths, device), max(lengths)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, device=device).to(dtype)
    weight = torch.randn(sum(lengths), heads, head_dim, device=device, dtype=torch.float64)

    def loss(x: Tensor, impl: str) -> Tensor:
        if dense:
            out = attention(x.unflatten(0, (len(lengths), longest)), causal=causal, impl=impl).flatten(0, 1)
        else:
            out = attention(x, cu_seqlens, longest, causal=causal, impl=impl)
        values.append(out.detach().double())
        return (out.double() * weight).sum()

    values: list[Tensor] = []
    ours = value_and_gradients(lambda x: loss(x, "triton"), (qkv,))
    exact = value_and_gradients(lambda x: loss(x, "reference"), (qkv,), torch.float64)
    for name, value, truth in (("out", *values), ("d_qkv", ours[1], exact[1])):
        error = relative_error(value, truth)
        assert error <= TOLERANCE[dtype], f"{name} of {lengths} x {head_dim}, causal {causal}: error {error:.1e}"


# one tile; blocks; a step beyond; an empty sequence and one of one token; the head dims of all published towers
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "head_dim"),
    [
        *(((50,), 64), ((0, 17, 1), 72), ((80,), 80), ((65, 0, 64), 88), ((128,), 104), ((33,), 112), ((97,), 128)),
        *(((257,), 64), ((77, 8, 1, 20), 64), ((9,), 40)),
    ],
)
@pytest.mark.usefixtures("triton_kernels")
def test_packed(device: str, lengths: tuple[int, ...], head_dim: int, causal: bool) -> None:
    check(lengths, head_dim, torch.float16, causal, device)


@pytest.mark.parametrize(("lengths", "head_dim"), [((20, 20), 64), ((33,), 80), ((1, 1), 64)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("triton_kernels")
def test_dense_in_float32(device: str, lengths: tuple[int, ...], head_dim: int, causal: bool) -> None:
    check(lengths, head_dim, torch.float32, causal, device, dense=True)


# both launches of the backward: a rest in a step and a block of its own, in a block alone, in neither
@pytest.mark.parametrize(("length", "head_dim", "causal"), DENSE)
@pytest.mark.usefixtures("triton_kernels")
def test_dense(device: str, length: int, head_dim: int, causal: bool) -> None:
    for dtype in (torch.float16, torch.bfloat16)[: 2 if device == "cuda" else 1]:
        check((length, length), head_dim, dtype, causal, device, dense=True, heads=2)


@pytest.mark.parametrize(("length", "causal"), [(77, True), (197, False), (257, False)])
@pytest.mark.usefixtures("triton_kernels")
def test_dense_runs_agree_bitwise(device: str, length: int, causal: bool) -> None:
    rows, heads = (64, 8) if device == "cuda" else (1, 2)
    qkv = torch.randn(rows, length, 3, heads, 64, device=device).half().requires_grad_()
    results = []
    for _ in range(2):
        out = attention(qkv, causal=causal, impl="triton")
        results.append((out.detach(), torch.autograd.grad(out.float().square().sum(), qkv)[0]))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.long
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("triton_kernels")
def test_split_in_every_way(triton_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, device: str, causal) -> None:
    """What the defaults do not use."""
    blocks = [triton_kernels.Tiles(*rows, False, 4, 2, split=True) for rows in ((64, 64), (128, 32), (64, 32))]
    for tiles, keys in itertools.product(blocks, blocks):
        monkeypatch.setattr(
            triton_kernels, "_tiles", lambda *x, t=tiles, k=keys: replace(t, keys=k) if x[5] else t
        )  # fmt: skip
        for length in (130, 144, 177, 192, 257):
            check((length,), 64, torch.float16, causal, device, dense=True)


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, 600, 100))
def test_every_length(triton_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, device: str, first: int) -> None:
    """1 to 200, then every fifth to 600 (the C++ kernels take every one), causal and not in turns, the head dims in
    turns; in blocks of 128 where the interpreter, as slow for a small block as for a large one, would take minutes."""
    tiles = triton_kernels._tiles

    def larger(dtype: torch.dtype, head_dim: int, longest: int, *options) -> object:
        chosen = tiles(dtype, head_dim, longest, *options)
        if chosen.whole or longest % 32 == 1:
            return chosen
        keys = chosen.keys and replace(chosen.keys, block=128, step=128)
        return replace(chosen, block=128, step=128, keys=keys)

    monkeypatch.setattr(triton_kernels, "_tiles", larger)
    for length in range(first + 1, first + 101, 1 if first < 200 else 5):
        head_dim = HEAD_DIMS[(length + length // 64) % len(HEAD_DIMS)]
        check((length,), head_dim, torch.float16, length % 2 == 0, device)


@pytest.mark.long
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.usefixtures("triton_kernels")
def test_every_head_dim_at_the_lengths_of_towers(device: str, head_dim: int) -> None:
    for length in (1, 16, 50, 64, 65, 77, 128, 129, 197, 257):
        check((length,), head_dim, torch.float16, length == 77, device)
    check((50,), head_dim, torch.float32, False, device)


@pytest.mark.parametrize(
    "length", [64, pytest.param(192, marks=pytest.mark.long)]
)  # % 128 == 64, where cuDNN's backward made NaN of such scores
@pytest.mark.usefixtures("triton_kernels")
def test_very_negative_lse(device: str, length: int) -> None:
    """N % 128 == 64, where cuDNN's backward made NaN of such scores."""
    qkv = torch.randn(1, length, 3, 1, 64, device=device)
    qkv[:, :, 0] = 4 + qkv[:, :, 0] / 8
    qkv[:, :, 1] = -4 + qkv[:, :, 1] / 8  # scores near -128
    assert (torch.einsum("bmhd,bnhd->bhmn", qkv[:, :, 0], qkv[:, :, 1]) / 8).logsumexp(-1).max() < -88.7
    exact, ours = (
        value_and_gradients(lambda x, i=impl: attention(x, impl=i).square().sum(), (qkv.to(dtype),))
        for impl, dtype in (("reference", torch.float64), ("triton", torch.float32))
    )
    assert ours[1].isfinite().all()
    assert relative_error(ours[1], exact[1]) < 1e-4


@pytest.mark.usefixtures("triton_kernels")
def test_errs_at_most_twice_as_much_as_eager(device: str) -> None:
    qkv, weight = (torch.randn(1, 70, *shape, device=device).half() for shape in ((3, 2, 64), (2, 64)))

    def eager(x: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in x.unbind(2))
        return (((q @ k.mT * 0.125).softmax(-1) @ v).transpose(1, 2) * weight.to(x.dtype)).double().sum()

    exact = value_and_gradients(eager, (qkv,), torch.float64)
    plain = value_and_gradients(eager, (qkv,))
    ours = value_and_gradients(lambda x: (attention(x, impl="triton") * weight).double().sum(), (qkv,))
    assert_within_budget(ours[1:], plain[1:], exact[1:], {"d_qkv": exact[1].norm().item()})


@pytest.mark.usefixtures("triton_kernels")
def test_sequences_do_not_see_each_other_and_runs_agree_bitwise(device: str) -> None:
    qkv, cu_seqlens = torch.randn(90, 3, 1, 64, device=device).half(), bounds((3, 2, 85), device)
    changed = qkv.clone()
    changed[3:5] = float("nan")
    results = []
    for x in (qkv, qkv, changed):
        x = x.clone().requires_grad_()
        out = attention(x, cu_seqlens, 85, causal=True, impl="triton")
        results.append((out.detach(), torch.autograd.grad(out.float().square().sum(), x)[0]))
    others = torch.tensor([i not in (3, 4) for i in range(90)], device=device)
    for first, second, third in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[others], third[others])
        assert third[~others].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "head_dim"), [((5, 1, 40), 24), ((50, 50), 80)])
@pytest.mark.usefixtures("triton_kernels")
def test_pooled(device: str, lengths: tuple[int, ...], head_dim: int, dtype: torch.dtype) -> None:
    cu_seqlens, longest = bounds(lengths, device), max(lengths)
    q = torch.randn(len(lengths), 2, head_dim, device=device).to(dtype)
    kv = torch.randn(sum(lengths), 2, 2, head_dim, device=device).to(dtype)
    weight = torch.randn(q.shape, device=device, dtype=torch.float64)
    dense = len(set(lengths)) == 1

    def loss(q: Tensor, kv: Tensor, impl: str) -> Tensor:
        if dense:
            out = pooled_attention(q, kv.unflatten(0, (len(lengths), -1)), impl=impl)
        else:
            out = pooled_attention(q, kv, cu_seqlens, longest, impl=impl)
        return (out.double() * weight).sum()

    exact = value_and_gradients(lambda *x: loss(*x, "reference"), (q, kv), torch.float64)
    plain = value_and_gradients(lambda *x: loss(*x, "reference"), (q, kv))
    ours = value_and_gradients(lambda *x: loss(*x, "triton"), (q, kv))
    units = {name: x.norm().item() for name, x in zip(("d_q", "d_kv"), exact[1:], strict=True)}
    assert_within_budget(ours[1:], plain[1:], exact[1:], units, torch.finfo(dtype).eps)


@pytest.mark.usefixtures("triton_kernels")
def test_no_sequence_and_no_row(device: str) -> None:
    for cu_seqlens in ([0], [0, 0, 0]):
        qkv = torch.zeros(0, 3, 2, 64, device=device, requires_grad=True)
        out = attention(qkv, torch.tensor(cu_seqlens, device=device).int(), 0, impl="triton")
        out.sum().backward()
        assert out.shape == (0, 2, 64)
        assert qkv.grad is not None
    assert attention(torch.zeros(2, 0, 3, 2, 64, device=device), impl="triton").shape == (2, 0, 2, 64)
    nothing = pooled_attention(
        torch.ones(1, 2, 8, device=device), torch.zeros(0, 2, 2, 8, device=device), bounds((0,), device), 0,
        impl="triton",
    )  # fmt: skip
    assert nothing.eq(0).all()


@pytest.mark.usefixtures("triton_kernels")
def test_registration(device: str) -> None:
    qkv, cu_seqlens = torch.randn(9, 3, 1, 16, device=device), bounds((4, 5), device)
    ops = torch.ops.fastclip
    out, lse = ops.attention_fwd(qkv, cu_seqlens, 5, True, 0.25, "triton")
    assert reference.attention(qkv, cu_seqlens, 5, causal=True).sub(out).abs().max() < 1e-5
    torch.library.opcheck(ops.attention_fwd.default, (qkv, cu_seqlens, 5, True, 0.25, "triton"))
    torch.library.opcheck(ops.attention_bwd.default, (out, qkv, out, lse, cu_seqlens, 5, True, 0.25, "triton"))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_pooled_compiles_without_spills(capability: int) -> None:
    assert assert_compiles(capability, "attention.triton_pooled", head_dims=(64, 80, 128)) > 3


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability: int) -> None:
    assert assert_compiles(capability, "attention.triton") == {80: 35, 90: 105, 100: 35}[capability]
