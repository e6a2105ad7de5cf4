"""Attention by Dao-AILab's flash-attn 2, where it is installed: its entries for packed QKV, with cu_seqlens or not."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    qkv: Tensor,  # (B, N, 3, H, D) or packed (T, 3, H, D)
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:  # (B, N, H, D) or (T, H, D)
    """See `fastclip.ops.attention.attention`. Its backward is asked to be deterministic."""
    from flash_attn import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func

    options = {"softmax_scale": softmax_scale, "causal": causal, "deterministic": True}
    if cu_seqlens is None:
        return flash_attn_qkvpacked_func(qkv, **options)
    return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens.int(), max_seqlen, **options)


def pooled_attention(
    q: Tensor,  # (B, H, D)
    kv: Tensor,  # (B, N, 2, H, D) or packed (T, 2, H, D)
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    softmax_scale: float | None = None,
) -> Tensor:  # (B, H, D)
    """See `fastclip.ops.attention.pooled_attention`."""
    from flash_attn import flash_attn_kvpacked_func, flash_attn_varlen_kvpacked_func

    options = {"softmax_scale": softmax_scale, "deterministic": True}
    if cu_seqlens is None:
        return flash_attn_kvpacked_func(q[:, None], kv, **options)[:, 0]
    one_each = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
    return flash_attn_varlen_kvpacked_func(q, kv, one_each, cu_seqlens.int(), 1, max_seqlen, **options)
