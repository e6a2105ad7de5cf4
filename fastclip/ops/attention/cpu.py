"""Attention by the C++ kernel of csrc/cpu/attention.cpp: a whole (sequence, head) in one thread's cache.

Straight from packed QKV and back into packed dQKV, fp32 sums, nothing kept for backward but the input. For float32 and
bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_fwd(
    qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Packed (T, 3, H, D) -> (T, H, D), and an empty lse: the backward does not need it."""
    out = torch.ops.fastclip_cpu.attention_fwd(qkv, cu_seqlens, max_seqlen, causal, softmax_scale)
    return out, qkv.new_empty((0, 0), dtype=torch.float32)


def attention_bwd(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    causal: bool,
    softmax_scale: float,
) -> Tensor:
    """The gradient for qkv: (T, 3, H, D)."""
    return torch.ops.fastclip_cpu.attention_bwd(d_out, qkv, cu_seqlens, max_seqlen, causal, softmax_scale)


def pooled_attention_fwd(
    q: Tensor, kv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, softmax_scale: float
) -> Tensor:
    """(B, H, D) queries over packed (T, 2, H, D) -> (B, H, D)."""
    return torch.ops.fastclip_cpu.pooled_attention_fwd(q, kv, cu_seqlens, max_seqlen, softmax_scale)


def pooled_attention_bwd(
    d_out: Tensor, q: Tensor, kv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients for q and kv."""
    return torch.ops.fastclip_cpu.pooled_attention_bwd(d_out, q, kv, cu_seqlens, max_seqlen, softmax_scale)
