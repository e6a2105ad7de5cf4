"""Attention through `torch.nn.functional.scaled_dot_product_attention`.

The packed form is padded to the longest sequence and back. Under a causal mask the padding lies behind every real
query and needs no mask of its own; otherwise the padded keys are masked. A mask is never given to cuDNN, whose backward
makes NaN of one where N % 128 == 64 and a row's lse is below -88.7 (pytorch#196678).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastclip.ops.attention.packing import gather_rows, padded_rows, scatter_rows

NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    qkv: Tensor,  # (B, N, 3, H, D) or packed (T, 3, H, D)
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:  # (B, N, H, D) or (T, H, D)
    """See `fastclip.ops.attention.attention`."""
    if cu_seqlens is None:
        return _dense(qkv, None, causal, softmax_scale)
    assert max_seqlen is not None
    num_sequences, total = cu_seqlens.numel() - 1, qkv.shape[0]
    rows = padded_rows(cu_seqlens, max_seqlen, total)
    padded = scatter_rows(qkv, rows, num_sequences * max_seqlen).unflatten(0, (num_sequences, max_seqlen))
    mask = None if causal else _key_mask(cu_seqlens, max_seqlen)
    return gather_rows(_dense(padded, mask, causal, softmax_scale).flatten(0, 1), rows)


def pooled_attention(
    q: Tensor,  # (B, H, D)
    kv: Tensor,  # (B, N, 2, H, D) or packed (T, 2, H, D)
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    softmax_scale: float | None = None,
) -> Tensor:  # (B, H, D)
    """See `fastclip.ops.attention.pooled_attention`."""
    mask = None
    if cu_seqlens is not None:
        assert max_seqlen is not None
        rows = padded_rows(cu_seqlens, max_seqlen, kv.shape[0])
        kv = scatter_rows(kv, rows, q.shape[0] * max_seqlen).unflatten(0, (q.shape[0], max_seqlen))
        mask = _key_mask(cu_seqlens, max_seqlen)
    k, v = kv.transpose(1, 3).unbind(2)  # each (B, H, N, D)
    with _backends(mask, q.device):
        return scaled_dot_product_attention(q[:, :, None], k, v, mask, scale=softmax_scale)[:, :, 0]


def _dense(qkv: Tensor, mask: Tensor | None, causal: bool, softmax_scale: float | None) -> Tensor:
    q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, H, N, D), views
    with _backends(mask, qkv.device):
        return scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=softmax_scale).transpose(1, 2)


def _backends(mask: Tensor | None, device: torch.device) -> AbstractContextManager[Any]:
    """The backends that may run: with a mask on CUDA, all but cuDNN."""
    return sdpa_kernel(NOT_CUDNN) if mask is not None and device.type == "cuda" else nullcontext()


def _key_mask(cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """True where a padded key is real: (B, 1, 1, max_seqlen)."""
    return (torch.arange(max_seqlen, device=cu_seqlens.device) < cu_seqlens.diff()[:, None])[:, None, None]
