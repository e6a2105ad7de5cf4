"""Registration: `fastclip::attention_fwd/_bwd` and `fastclip::pooled_attention_fwd/_bwd`, an autograd.Function each.

For the implementations with kernels of their own, "cpu" and "triton"; the others are built of torch's operators. Rows
are packed here, (T, 3, H, D): sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1], or without cu_seqlens rows
b * max_seqlen to (b + 1) * max_seqlen. Kept for backward: the input, and for "triton" the output, which the product
behind it keeps anyway, and the lse (H, T).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KERNELS = ("cpu", "triton")
_SEQUENCES = "Tensor? cu_seqlens, SymInt max_seqlen"
_library = torch.library.Library("fastclip", "FRAGMENT")
_library.define(
    f"attention_fwd(Tensor qkv, {_SEQUENCES}, bool causal, float softmax_scale, str impl) -> (Tensor out, Tensor lse)"
)
_library.define(
    f"attention_bwd(Tensor d_out, Tensor qkv, Tensor? out, Tensor? lse, {_SEQUENCES}, bool causal, float softmax_scale,"
    " str impl) -> Tensor"
)
_library.define(f"pooled_attention_fwd(Tensor q, Tensor kv, {_SEQUENCES}, float softmax_scale, str impl) -> Tensor")
_library.define(
    f"pooled_attention_bwd(Tensor d_out, Tensor q, Tensor kv, {_SEQUENCES}, float softmax_scale, str impl)"
    " -> (Tensor, Tensor)"
)


@cache
def _kernel(name: str, impl: str) -> Any:
    module = "triton_pooled" if impl == "triton" and name.startswith("pooled") else impl
    return getattr(import_module(f"fastclip.ops.attention.{module}"), name)


def _packed(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fwd_fake(qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, causal: bool, scale: float, impl: str) -> Any:
    total, _, heads, _ = qkv.shape
    lse = qkv.new_empty((heads, total) if impl == "triton" else (0, 0), dtype=torch.float32)
    return qkv.new_empty(qkv[:, 0].shape), lse


def _run(name: str) -> Any:
    def kernel(*arguments: Any) -> Any:
        *tensors, impl = arguments
        return _kernel(name, impl)(*tensors)

    return kernel


for _name, _fake in (
    ("attention_fwd", _fwd_fake),
    ("attention_bwd", lambda d_out, qkv, *_: _packed(qkv)),
    ("pooled_attention_fwd", lambda q, *_: _packed(q)),
    ("pooled_attention_bwd", lambda d_out, q, kv, *_: (_packed(q), _packed(kv))),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _run(_name), _key)
    torch.library.register_fake(f"fastclip::{_name}", _fake, lib=_library)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor | None, *options: Any) -> Tensor:
        out, lse = torch.ops.fastclip.attention_fwd(qkv, cu_seqlens, *options)
        kept = (out, lse) if options[-1] == "triton" else (None, None)
        ctx.save_for_backward(qkv, *kept, cu_seqlens)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        d_qkv = torch.ops.fastclip.attention_bwd(d_out, *ctx.saved_tensors, *ctx.options)
        return d_qkv, None, None, None, None, None


class _PooledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, cu_seqlens: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(q, kv, cu_seqlens)
        ctx.options = options
        return torch.ops.fastclip.pooled_attention_fwd(q, kv, cu_seqlens, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        d_q, d_kv = torch.ops.fastclip.pooled_attention_bwd(d_out, *ctx.saved_tensors, *ctx.options)
        return d_q, d_kv, None, None, None, None


def attention(
    qkv: Tensor,  # (B, N, 3, H, D) or packed (T, 3, H, D)
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    *,
    causal: bool,
    softmax_scale: float | None,
    impl: str,
) -> Tensor:  # (B, N, H, D) or (T, H, D)
    """`fastclip.ops.attention.attention` by one of `KERNELS`."""
    scale = qkv.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if cu_seqlens is not None:
        return _Attention.apply(qkv, cu_seqlens.int(), max_seqlen, causal, scale, impl)
    batch, length = qkv.shape[:2]
    return _Attention.apply(qkv.flatten(0, 1), None, length, causal, scale, impl).unflatten(0, (batch, length))


def pooled_attention(
    q: Tensor,  # (B, H, D)
    kv: Tensor,  # (B, N, 2, H, D) or packed (T, 2, H, D)
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    *,
    softmax_scale: float | None,
    impl: str,
) -> Tensor:  # (B, H, D)
    """`fastclip.ops.attention.pooled_attention` by one of `KERNELS`."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if cu_seqlens is None:
        max_seqlen, kv = kv.shape[1], kv.flatten(0, 1)
    else:
        cu_seqlens = cu_seqlens.int()
    return _PooledAttention.apply(q, kv, cu_seqlens, max_seqlen, scale, impl)
