"""Attention by xformers' `memory_efficient_attention`, where it is installed; packed, with its block-diagonal masks.

Those masks hold the bounds as a Python list too, so that packed sequences cost one device synchronisation a call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def attention(
    qkv: Tensor,  # (B, N, 3, H, D) or packed (T, 3, H, D)
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:  # (B, N, H, D) or (T, H, D)
    """See `fastclip.ops.attention.attention`."""
    from xformers.ops import fmha, memory_efficient_attention

    if cu_seqlens is None:
        mask = fmha.attn_bias.LowerTriangularMask() if causal else None
        return memory_efficient_attention(*qkv.unbind(2), attn_bias=mask, scale=softmax_scale)
    masks = fmha.attn_bias.BlockDiagonalCausalMask if causal else fmha.attn_bias.BlockDiagonalMask
    mask = masks.from_seqlens(_lengths(cu_seqlens))
    return memory_efficient_attention(*qkv[None].unbind(2), attn_bias=mask, scale=softmax_scale)[0]


def pooled_attention(
    q: Tensor,  # (B, H, D)
    kv: Tensor,  # (B, N, 2, H, D) or packed (T, 2, H, D)
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    softmax_scale: float | None = None,
) -> Tensor:  # (B, H, D)
    """See `fastclip.ops.attention.pooled_attention`."""
    from xformers.ops import fmha, memory_efficient_attention

    if cu_seqlens is None:
        return memory_efficient_attention(q[:, None], *kv.unbind(2), scale=softmax_scale)[:, 0]
    lengths = _lengths(cu_seqlens)
    mask: Any = fmha.attn_bias.BlockDiagonalMask.from_seqlens([1] * len(lengths), lengths)
    return memory_efficient_attention(q[None], *kv[None].unbind(2), attn_bias=mask, scale=softmax_scale)[0]


def _lengths(cu_seqlens: Tensor) -> list[int]:
    return cu_seqlens.diff().tolist()
