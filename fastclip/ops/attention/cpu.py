"""Attention by the C++ kernel of csrc/cpu/attention.cpp: a whole (sequence, head) in one thread's cache.

Straight from packed QKV and back into packed dQKV, fp32 sums, nothing kept for backward but the input. Registered as
`fastclip::attention_fwd/_bwd` and `fastclip::pooled_attention_fwd/_bwd` with fakes, one autograd.Function each outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_library = torch.library.Library("fastclip", "FRAGMENT")
_SEQUENCES = "Tensor cu_seqlens, SymInt max_seqlen"
_library.define(f"attention_fwd(Tensor qkv, {_SEQUENCES}, bool causal, float softmax_scale) -> Tensor")
_library.define(f"attention_bwd(Tensor d_out, Tensor qkv, {_SEQUENCES}, bool causal, float softmax_scale) -> Tensor")
_library.define(f"pooled_attention_fwd(Tensor q, Tensor kv, {_SEQUENCES}, float softmax_scale) -> Tensor")
_library.define(
    f"pooled_attention_bwd(Tensor d_out, Tensor q, Tensor kv, {_SEQUENCES}, float softmax_scale) -> (Tensor, Tensor)"
)


def _run(name: str, *args: Any) -> Any:
    return getattr(torch.ops.fastclip_cpu, name)(*args)


def _packed(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


for _name in ("attention_fwd", "attention_bwd", "pooled_attention_fwd", "pooled_attention_bwd"):
    _library.impl(_name, lambda *args, _name=_name: _run(_name, *args), "CPU")
torch.library.register_fake("fastclip::attention_fwd", lambda qkv, *_: qkv.new_empty(qkv[:, 0].shape), lib=_library)
torch.library.register_fake("fastclip::attention_bwd", lambda d_out, qkv, *_: _packed(qkv), lib=_library)
torch.library.register_fake("fastclip::pooled_attention_fwd", lambda q, *_: _packed(q), lib=_library)
torch.library.register_fake(
    "fastclip::pooled_attention_bwd", lambda d_out, q, kv, *_: (_packed(q), _packed(kv)), lib=_library
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float) -> Tensor:
        ctx.save_for_backward(qkv, cu_seqlens)
        ctx.options = (max_seqlen, causal, scale)
        return torch.ops.fastclip.attention_fwd(qkv, cu_seqlens, max_seqlen, causal, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.fastclip.attention_bwd(d_out, *ctx.saved_tensors, *ctx.options), None, None, None, None


class _PooledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
        ctx.save_for_backward(q, kv, cu_seqlens)
        ctx.options = (max_seqlen, scale)
        return torch.ops.fastclip.pooled_attention_fwd(q, kv, cu_seqlens, max_seqlen, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        d_q, d_kv = torch.ops.fastclip.pooled_attention_bwd(d_out, *ctx.saved_tensors, *ctx.options)
        return d_q, d_kv, None, None, None


def attention(
    qkv: Tensor,  # (B, N, 3, H, D) or packed (T, 3, H, D)
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:  # (B, N, H, D) or (T, H, D)
    """See `fastclip.ops.attention.attention`."""
    scale = qkv.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if cu_seqlens is not None:
        assert max_seqlen is not None
        return _Attention.apply(qkv, cu_seqlens.int(), max_seqlen, causal, scale)
    batch, length = qkv.shape[:2]
    return _Attention.apply(qkv.flatten(0, 1), _even(batch, length), length, causal, scale).unflatten(
        0, (batch, length)
    )


def pooled_attention(
    q: Tensor,  # (B, H, D)
    kv: Tensor,  # (B, N, 2, H, D) or packed (T, 2, H, D)
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    softmax_scale: float | None = None,
) -> Tensor:  # (B, H, D)
    """See `fastclip.ops.attention.pooled_attention`."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if cu_seqlens is None:
        cu_seqlens, max_seqlen, kv = _even(*kv.shape[:2]), kv.shape[1], kv.flatten(0, 1)
    assert max_seqlen is not None
    return _PooledAttention.apply(q, kv, cu_seqlens.int(), max_seqlen, scale)


def _even(batch: int, length: int) -> Tensor:
    """The bounds of `batch` sequences of one length."""
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32) if length else torch.zeros(batch + 1).int()
