"""Attention: the specification against a loop over tokens, every implementation against the specification."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastclip.ops.attention import PackedText, attention, pack_text, pooled_attention, reference
from fastclip.ops.attention.packing import gather_rows, padded_rows, scatter_rows
from fastclip.testing import assert_within_budget, value_and_gradients

LENGTHS = (3, 1, 17, 8)  # a single token, and a longest that is no multiple of anything


def cu_seqlens_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).int()


def one_token(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one query (D,) over keys (N, D), written out."""
    weights = [math.exp(scale * float(q @ key)) for key in k]
    total = sum(w * value for w, value in zip(weights, v, strict=True))
    return total / sum(weights)


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_softmax_over_the_keys_a_query_may_see(causal: bool) -> None:
    qkv = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64)
    out = reference.attention(qkv, causal=causal, softmax_scale=0.7)
    for b, n, h in [(0, 0, 0), (0, 2, 1), (1, 4, 0)]:
        seen = n + 1 if causal else 5
        expected = one_token(qkv[b, n, 0, h], qkv[b, :seen, 1, h], qkv[b, :seen, 2, h], 0.7)
        torch.testing.assert_close(out[b, n, h], expected)


def test_default_scale_is_one_over_the_root_of_head_dim() -> None:
    qkv = torch.randn(1, 6, 3, 2, 16)
    for impl in ("reference", "sdpa"):
        out, scaled = attention(qkv, impl=impl), attention(qkv, softmax_scale=0.25, impl=impl)
        torch.testing.assert_close(out, scaled)


# 1 token; B/32 and B/16 image towers; text; head dims of the H and g towers
@pytest.mark.parametrize(("n", "head_dim"), [(1, 64), (50, 64), (197, 32), (77, 64), (33, 80), (9, 88)])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_dense_is_the_reference(n: int, head_dim: int, causal: bool) -> None:
    qkv = torch.randn(2, n, 3, 2, head_dim, dtype=torch.float64)
    weight = torch.randn(2, n, 2, head_dim, dtype=torch.float64)
    results = [
        value_and_gradients(lambda x, i=impl: (attention(x, causal=causal, impl=i) * weight).sum(), (qkv,))
        for impl in ("sdpa", "reference")
    ]
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [LENGTHS, (5,), (0, 4, 0, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_packed_is_each_sequence_alone(lengths: tuple[int, ...], causal: bool) -> None:
    cu_seqlens = cu_seqlens_of(lengths)
    qkv = torch.randn(sum(lengths), 3, 2, 8, dtype=torch.float64, requires_grad=True)
    out = attention(qkv, cu_seqlens, max(lengths), causal=causal, impl="sdpa")
    alone = torch.cat([reference.attention(part[None], causal=causal)[0] for part in qkv.split(lengths)])
    torch.testing.assert_close(out, alone, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    ours, truth = (torch.autograd.grad((y * weight).sum(), qkv)[0] for y in (out, alone))
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(reference.attention(qkv, cu_seqlens, max(lengths), causal=causal), alone)


def test_packed_sequences_do_not_see_each_other() -> None:
    cu_seqlens = cu_seqlens_of(LENGTHS)
    qkv = torch.randn(sum(LENGTHS), 3, 2, 8)
    changed = qkv.clone()
    changed[3:4] = float("nan")  # the second sequence
    before, after = (attention(x, cu_seqlens, max(LENGTHS), causal=True) for x in (qkv, changed))
    others = torch.arange(len(qkv)) != 3
    assert torch.equal(before[others], after[others])
    assert after[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_sdpa_errs_at_most_twice_as_much_as_eager(dtype: torch.dtype, packed: bool) -> None:
    lengths = (40, 40)
    shape = (80, 3, 2, 64) if packed else (2, 40, 3, 2, 64)
    where = (cu_seqlens_of(lengths), 40) if packed else (None, None)
    qkv, weight = torch.randn(shape).to(dtype), torch.randn(2, 40, 2, 64).to(dtype)

    def through_sdpa(x: Tensor) -> Tensor:
        return attention(x, *where, causal=True, impl="sdpa").view_as(weight).float().mul(weight).sum()

    def eager(x: Tensor) -> Tensor:
        q, k, v = x.view(2, 40, 3, 2, 64).permute(2, 0, 3, 1, 4)
        hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
        scores = (q @ k.mT * 0.125).masked_fill(hidden, float("-inf"))
        out = (scores.softmax(-1) @ v).transpose(1, 2)
        return out.mul(weight.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32)).sum()

    exact = value_and_gradients(eager, (qkv,), torch.float64)
    results = value_and_gradients(through_sdpa, (qkv,))
    plain = value_and_gradients(eager, (qkv,))
    units = {"d_qkv": exact[1].norm().item()}
    assert_within_budget(results[1:], plain[1:], exact[1:], units, floor=torch.finfo(dtype).eps)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("packed", [False, True])
def test_pooled_attention_is_the_last_row_of_causal_attention(impl: str, packed: bool) -> None:
    lengths = LENGTHS if packed else (6, 6, 6)
    cu_seqlens = cu_seqlens_of(lengths)
    last = cu_seqlens[1:].long() - 1
    qkv = torch.randn(sum(lengths), 3, 2, 8, dtype=torch.float64, requires_grad=True)
    full = attention(qkv, cu_seqlens, max(lengths), causal=True, impl="reference")[last]
    q, kv = qkv[last, 0], qkv[:, 1:]
    if packed:
        pooled = pooled_attention(q, kv, cu_seqlens, max(lengths), impl=impl)
    else:
        pooled = pooled_attention(q, kv.unflatten(0, (3, 6)), impl=impl)
    torch.testing.assert_close(pooled, full, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(full)
    ours, truth = (torch.autograd.grad((y * weight).sum(), qkv, retain_graph=True)[0] for y in (pooled, full))
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


def test_rows_move_there_and_back() -> None:
    cu_seqlens = cu_seqlens_of((2, 0, 3))
    rows = padded_rows(cu_seqlens, 4, 5)
    assert rows.tolist() == [0, 1, 8, 9, 10]
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    padded = scatter_rows(x, rows, 12)
    assert torch.equal(gather_rows(padded, rows), x)
    assert torch.count_nonzero(padded) == x.numel()
    assert torch.autograd.gradcheck(lambda y: scatter_rows(y, rows, 12), x)
    assert torch.autograd.gradcheck(lambda y: gather_rows(y, rows), padded.detach().requires_grad_())


def test_captions_are_cut_behind_their_first_largest_id() -> None:
    ids = torch.tensor(
        [
            [5, 1, 9, 0, 0, 0],  # end-of-text 9 at position 2
            [5, 9, 9, 9, 9, 9],  # padded with end-of-text, as Hugging Face does
            [5, 1, 2, 3, 4, 9],  # as long as the context
            [0, 0, 0, 0, 0, 0],  # nothing at all: one token is kept
            [5, 3, 7, 1, 0, 0],  # no end-of-text: the tower pools at the 7
        ]
    )
    packed = pack_text(ids)
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == [0, 3, 5, 11, 12, 15]
    assert packed.tokens.tolist() == [5, 1, 9, 5, 9, 5, 1, 2, 3, 4, 9, 0, 5, 3, 7]
    assert packed.positions().tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5, 0, 0, 1, 2]
    assert packed.max_seqlen == 6
    assert len(packed) == 5


def test_packing_an_empty_batch() -> None:
    packed = pack_text(torch.zeros(0, 7, dtype=torch.long))
    assert len(packed) == 0
    assert packed.tokens.shape == (0,)
    assert packed.max_seqlen == 0


def test_packed_text_moves_whole_and_is_no_tuple() -> None:
    packed = pack_text(torch.tensor([[1, 3, 0], [3, 0, 0]]))
    assert not isinstance(packed, tuple)
    moved = packed.to("meta")
    assert isinstance(moved, PackedText)
    assert (moved.tokens.device.type, moved.cu_seqlens.device.type, moved.max_seqlen) == ("meta", "meta", 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(torch.zeros(2, 5, 2, 8)), r"qkv must be \(B, N, 3, H, D\), was \(2, 5, 2, 8\)"),
        (lambda: attention(torch.zeros(2, 5, 4, 2, 8)), "qkv must be"),
        (lambda: attention(torch.zeros(2, 5, 3, 2, 8), impl="flash"), "impl.*'flash'"),
        (lambda: attention(torch.zeros(5, 3, 2, 8), torch.tensor([0, 5])), "cu_seqlens and max_seqlen must be given"),
        (lambda: attention(torch.zeros(5, 3, 2, 8), torch.tensor([0.0, 5.0]), 5), "cu_seqlens must be integers"),
        (lambda: pooled_attention(torch.zeros(2, 2, 4), torch.zeros(2, 5, 2, 2, 8)), r"q must be \(2, 2, 8\)"),
        (lambda: pack_text(torch.zeros(3, dtype=torch.long)), "ids must be integer"),
        (lambda: pack_text(torch.zeros(3, 4)), "ids must be integer"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
