"""What attention means: plain PyTorch, any device, any float dtype (half types are computed in fp32)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def attention(
    qkv: Tensor,  # (B, N, 3, H, D) or packed (T, 3, H, D)
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    max_seqlen: int | None = None,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:  # (B, N, H, D) or (T, H, D)
    """softmax(softmax_scale * Q K^T) V per sequence and head; `causal` hides the keys behind each query."""
    if cu_seqlens is not None:
        sequences = [qkv[start:end, None].transpose(0, 1) for start, end in pairwise(cu_seqlens.tolist())]
        outs = [attention(s, causal=causal, softmax_scale=softmax_scale)[0] for s in sequences]
        return torch.cat(outs) if outs else qkv[:, 0]
    q, k, v = _at_least_fp32(qkv).permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
    scores = (q @ k.mT) * _scale(q, softmax_scale)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).to(qkv.dtype)


def pooled_attention(
    q: Tensor,  # (B, H, D)
    kv: Tensor,  # (B, N, 2, H, D) or packed (T, 2, H, D)
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    max_seqlen: int | None = None,
    *,
    softmax_scale: float | None = None,
) -> Tensor:  # (B, H, D)
    """One query a sequence against all keys of that sequence."""
    if cu_seqlens is not None:
        bounds = enumerate(pairwise(cu_seqlens.tolist()))
        outs = [pooled_attention(q[b : b + 1], kv[None, i:j], softmax_scale=softmax_scale) for b, (i, j) in bounds]
        return torch.cat(outs) if outs else q
    k, v = _at_least_fp32(kv).unbind(2)  # each (B, N, H, D)
    query = _at_least_fp32(q)
    weights = (torch.einsum("bhd,bnhd->bhn", query, k) * _scale(query, softmax_scale)).softmax(-1)
    return torch.einsum("bhn,bnhd->bhd", weights, v).to(q.dtype)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
