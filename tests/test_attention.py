"""Attention: the specification against a loop over tokens, every implementation against the specification."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch import Tensor

from fastclip.ops import _dispatch, _tuned
from fastclip.ops.attention import (
    PackedText,
    attention,
    explain,
    flash_attn,
    pack_text,
    pooled_attention,
    reference,
    sdpa,
    xformers,
)
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


def packed(total: int, bounds: list[int], max_seqlen: int) -> Tensor:
    return attention(torch.zeros(total, 3, 2, 8), torch.tensor(bounds), max_seqlen)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(torch.zeros(2, 5, 2, 8)), r"qkv must be \(B, N, 3, H, D\), was \(2, 5, 2, 8\)"),
        (lambda: attention(torch.zeros(2, 5, 4, 2, 8)), "qkv must be"),
        (lambda: attention(torch.zeros(2, 5, 3, 2, 8), impl="flash"), "impl.*'flash'"),
        (lambda: attention(torch.zeros(5, 3, 2, 8), torch.tensor([0, 5])), "cu_seqlens and max_seqlen must be given"),
        (lambda: attention(torch.zeros(5, 3, 2, 8), torch.tensor([0.0, 5.0]), 5), "cu_seqlens must be integers"),
        (lambda: packed(9, [0, 4], 5), "cu_seqlens ends at 4, must end at 9, the rows of qkv$"),
        (lambda: packed(9, [1, 5, 9], 5), "cu_seqlens starts at 1, must start at 0$"),
        (lambda: packed(9, [0, 9], 5), "cu_seqlens has a sequence of 9 rows, more than max_seqlen = 5$"),
        (lambda: packed(9, [2, 8, 3, 4], 5), "starts at 2.*ends at 4.*falls from 8 to 3 at position 1.*of 6 rows"),
        (lambda: attention(torch.zeros(5, 3, 2, 8).int(), torch.tensor([0, 5]), 5), "qkv must be.*torch.int32"),
        (
            lambda: attention(torch.zeros(5, 3, 2, 8), torch.tensor([0, 5], device="meta"), 5),
            "cu_seqlens must be on cpu like qkv, was on meta",
        ),
        (lambda: pooled_attention(torch.zeros(2, 2, 4), torch.zeros(2, 5, 2, 2, 8)), r"q must be \(2, 2, 8\)"),
        (lambda: pack_text(torch.zeros(3, dtype=torch.long)), "ids must be integer"),
        (lambda: pack_text(torch.zeros(3, 4)), "ids must be integer"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mask_on_cuda_never_meets_cudnn() -> None:
    """Its backward makes NaN there of rows whose lse is below -88.7, where N % 128 == 64."""
    mask = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    with sdpa._backends(mask, torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    with sdpa._backends(None, torch.device("cuda")):
        assert torch.backends.cuda.cudnn_sdp_enabled()


def fake_flash_attn() -> types.ModuleType:
    """flash-attn 2's four entries, with its signatures, on the specification."""
    module = types.ModuleType("flash_attn")

    def qkvpacked(qkv, dropout_p=0.0, softmax_scale=None, causal=False, *, deterministic=False):
        return reference.attention(qkv, causal=causal, softmax_scale=softmax_scale)

    def varlen_qkvpacked(
        qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, *, deterministic
    ):
        assert cu_seqlens.dtype == torch.int32
        return reference.attention(qkv, cu_seqlens, max_seqlen, causal=causal, softmax_scale=softmax_scale)

    def kvpacked(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, *, deterministic=False):
        return reference.pooled_attention(q[:, 0], kv, softmax_scale=softmax_scale)[:, None]

    def varlen_kvpacked(q, kv, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=None, *, deterministic=False):
        assert (cu_q.diff() == 1).all()
        assert max_q == 1
        return reference.pooled_attention(q, kv, cu_k, max_k, softmax_scale=softmax_scale)

    module.flash_attn_qkvpacked_func, module.flash_attn_varlen_qkvpacked_func = qkvpacked, varlen_qkvpacked
    module.flash_attn_kvpacked_func, module.flash_attn_varlen_kvpacked_func = kvpacked, varlen_kvpacked
    return module


def fake_xformers() -> types.ModuleType:
    """xformers' `memory_efficient_attention` and the masks we use, on the specification."""
    package, module = types.ModuleType("xformers"), types.ModuleType("xformers.ops")

    class LowerTriangularMask:
        pass

    class BlockDiagonalMask:
        is_causal = False

        @classmethod
        def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int] | None = None):
            mask = cls()
            mask.q, mask.kv = q_seqlen, kv_seqlen or q_seqlen
            return mask

    class BlockDiagonalCausalMask(BlockDiagonalMask):
        is_causal = True

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        if not isinstance(attn_bias, BlockDiagonalMask):
            if query.shape[1] == 1 != key.shape[1]:
                return reference.pooled_attention(query[:, 0], torch.stack((key, value), 2), softmax_scale=scale)[
                    :, None
                ]
            causal = isinstance(attn_bias, LowerTriangularMask)
            return reference.attention(torch.stack((query, key, value), 2), causal=causal, softmax_scale=scale)
        kv, cu_seqlens = torch.stack((key[0], value[0]), 1), cu_seqlens_of(tuple(attn_bias.kv))
        if attn_bias.q != attn_bias.kv:
            return reference.pooled_attention(query[0], kv, cu_seqlens, max(attn_bias.kv), softmax_scale=scale)[None]
        qkv = torch.cat((query[0][:, None], kv), 1)
        return reference.attention(qkv, cu_seqlens, 99, causal=attn_bias.is_causal, softmax_scale=scale)[None]

    bias = types.SimpleNamespace(
        LowerTriangularMask=LowerTriangularMask,
        BlockDiagonalMask=BlockDiagonalMask,
        BlockDiagonalCausalMask=BlockDiagonalCausalMask,
    )
    module.memory_efficient_attention, module.fmha = memory_efficient_attention, types.SimpleNamespace(attn_bias=bias)
    package.ops = module
    return package


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
@pytest.mark.parametrize("causal", [False, True])
def test_libraries_are_called_with_their_own_arguments(monkeypatch, name: str, causal: bool) -> None:
    """Neither has a CPU path: what is checked is what we ask of them."""
    fake = {"flash_attn": fake_flash_attn, "xformers": fake_xformers}[name]()
    monkeypatch.setitem(sys.modules, name, fake)
    if name == "xformers":
        monkeypatch.setitem(sys.modules, "xformers.ops", fake.ops)
    library = {"flash_attn": flash_attn, "xformers": xformers}[name]
    cu_seqlens, longest = cu_seqlens_of(LENGTHS), max(LENGTHS)
    qkv, dense = torch.randn(sum(LENGTHS), 3, 2, 8), torch.randn(2, 5, 3, 2, 8)
    q, kv = torch.randn(len(LENGTHS), 2, 8), qkv[:, 1:]
    options = {"causal": causal, "softmax_scale": 0.3}
    for arguments in ((qkv, cu_seqlens.long(), longest), (dense,)):
        ours, truth = (module.attention(*arguments, **options) for module in (library, reference))
        torch.testing.assert_close(ours, truth)
    for arguments in ((q, kv, cu_seqlens.long(), longest), (q[:2], dense[:, :, 1:])):
        ours, truth = (module.pooled_attention(*arguments, softmax_scale=0.3) for module in (library, reference))
        torch.testing.assert_close(ours, truth)


def test_says_why_an_implementation_is_not_taken(monkeypatch) -> None:
    reasons = {v.impl: v.reason for v in explain("cpu", torch.float64, 50)}
    assert reasons["sdpa"] == "first that can run"
    assert "it takes float32 and bfloat16, not torch.float64" in reasons["cpu"]
    with pytest.raises(ValueError, match="impl='flash_attn' cannot run: the package flash_attn is not installed"):
        attention(torch.zeros(1, 4, 3, 1, 8).half(), impl="flash_attn")
    monkeypatch.setattr(_dispatch, "has_package", lambda name: True)
    half = {v.impl: v.reason for v in explain("cpu", torch.float16, 50, 264)}
    assert half["flash_attn"] == "it takes heads of up to 256 dimensions, not 264"
    assert half["triton"] == "it takes heads of up to 128 dimensions, not 264"
    cuda = {v.impl: v.reason for v in explain("cuda", torch.float16, 50, 36)}
    assert cuda["xformers"] == "it takes heads of a multiple of 8 dimensions, not 36"
    assert cuda["flash_attn"] == "auto prefers sdpa here"
    assert "CUDA devices only" in {v.impl: v.reason for v in explain("cpu", torch.float16, 50)}["xformers"]


@pytest.mark.parametrize(
    ("gpu", "dtype", "length", "head_dim", "is_packed", "impl", "why"),
    [
        ("NVIDIA H200", torch.bfloat16, 77, 64, False, "triton", "measured at 77: triton 0.502 ms, sdpa 1.57 ms"),
        ("NVIDIA H200", torch.float16, 257, 64, False, "triton", "measured at 257"),
        ("NVIDIA H200", torch.bfloat16, 50, 64, False, "triton", "predicted"),
        ("NVIDIA H200", torch.bfloat16, 577, 64, False, "sdpa", "predicted"),
        ("NVIDIA H200", torch.bfloat16, 77, 64, True, "sdpa", "not measured"),
        ("NVIDIA H200", torch.bfloat16, 257, 80, False, "sdpa", "not measured"),
        ("NVIDIA A100", torch.bfloat16, 197, 64, False, "triton", "predicted"),
        ("NVIDIA A100", torch.bfloat16, 1024, 64, False, "sdpa", "predicted"),
        ("NVIDIA A100", torch.float32, 197, 64, False, "sdpa", "not measured"),
        ("", torch.bfloat16, 0, 64, False, "sdpa", "predicted"),
    ],
)
def test_auto_on_cuda_takes_what_was_measured_there_or_what_needs_less(
    gpu: str,
    dtype: torch.dtype,
    length: int,
    head_dim: int,
    is_packed: bool,
    impl: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_tuned, "gpu_name", lambda: gpu)
    monkeypatch.setattr(_dispatch, "has_package", lambda name: True)
    (taken,) = [v for v in explain("cuda", dtype, length, head_dim, is_packed) if v.chosen]
    assert taken.impl == impl
    assert taken.reason.startswith(why)
    monkeypatch.setattr(_dispatch, "has_package", lambda name: False)
    assert [v.impl for v in explain("cuda", dtype, length, head_dim, is_packed) if v.chosen] == ["sdpa"]
