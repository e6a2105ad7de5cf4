"""Multi-head attention on the product of one QKV matrix, dense or packed.

    O = softmax(softmax_scale * Q K^T) V    per sequence and head

`qkv` is (B, N, 3, H, D) for B sequences of N tokens, or (T, 3, H, D) for sequences laid end to end, where
`cu_seqlens` (B + 1,) int32 holds their bounds and `max_seqlen` the longest: FlashAttention's layout and names.
Implementations: `reference` (the specification), `sdpa` (PyTorch's fused kernels, on every device; the packed form is
padded for the call), `cpu` (C++) and `triton` (both straight on the packed product, forward and backward), and by name
`xformers` and `flash_attn` where they are installed.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastclip.ops.attention import flash_attn, op, reference, sdpa, xformers
from fastclip.ops.attention.implementations import IMPLS, explain, pick
from fastclip.ops.attention.packing import PackedText, pack_text

__all__ = ["IMPLS", "PackedText", "attention", "explain", "pack_text", "pooled_attention"]

_COMPOSED = {"reference": reference, "sdpa": sdpa, "xformers": xformers, "flash_attn": flash_attn}


def attention(
    qkv: Tensor,  # (B, N, 3, H, D) or packed (T, 3, H, D)
    cu_seqlens: Tensor | None = None,  # (B + 1,) int32
    max_seqlen: int | None = None,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(softmax_scale * Q K^T) V: (B, N, 3, H, D) -> (B, N, H, D), packed (T, 3, H, D) -> (T, H, D).

    causal: a query sees the keys up to its own position in its own sequence.
    softmax_scale: default D ** -0.5.
    impl: "auto", "reference", "sdpa", "cpu", "triton", "xformers" or "flash_attn".
    Raises ValueError for a shape or an option that does not fit, bounds that do not add up (looked at where they are on
    the CPU), or an impl that cannot run here, with the reason.
    """
    _check("qkv", qkv, 3, cu_seqlens, max_seqlen)
    name = _pick(impl, qkv, max_seqlen)
    if name in op.KERNELS:
        return op.attention(qkv, cu_seqlens, max_seqlen, causal=causal, softmax_scale=softmax_scale, impl=name)
    kernels = _COMPOSED[name]
    return kernels.attention(qkv, cu_seqlens, max_seqlen, causal=causal, softmax_scale=softmax_scale)


def pooled_attention(
    q: Tensor,  # (B, H, D)
    kv: Tensor,  # (B, N, 2, H, D) or packed (T, 2, H, D)
    cu_seqlens: Tensor | None = None,  # (B + 1,) int32
    max_seqlen: int | None = None,
    *,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """One query a sequence against all its keys, as a pooled class token or a caption's last token needs: (B, H, D).

    Equals the rows of `attention` at those tokens; every packed sequence must hold at least one token.
    """
    _check("kv", kv, 2, cu_seqlens, max_seqlen)
    num_sequences = kv.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if q.shape != (num_sequences, *kv.shape[-2:]):
        raise ValueError(f"q must be {(num_sequences, *kv.shape[-2:])} to fit kv, was {tuple(q.shape)}")
    name = _pick(impl, kv, max_seqlen)
    if name in op.KERNELS:
        return op.pooled_attention(q, kv, cu_seqlens, max_seqlen, softmax_scale=softmax_scale, impl=name)
    return _COMPOSED[name].pooled_attention(q, kv, cu_seqlens, max_seqlen, softmax_scale=softmax_scale)


def _pick(impl: str, x: Tensor, max_seqlen: int | None) -> str:
    length = x.shape[1] if max_seqlen is None else max_seqlen
    return pick(impl, x.device.type, x.dtype, length, x.shape[-1], is_packed=max_seqlen is not None)


def _check(name: str, x: Tensor, parts: int, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
    dims = 5 if cu_seqlens is None else 4
    if x.dim() != dims or x.shape[-3] != parts or not x.is_floating_point():
        expected = f"(B, N, {parts}, H, D)" if cu_seqlens is None else f"packed (T, {parts}, H, D)"
        raise ValueError(f"{name} must be {expected}, was {tuple(x.shape)} of {x.dtype}")
    if cu_seqlens is None or max_seqlen is None:
        if (cu_seqlens is None) != (max_seqlen is None):
            raise ValueError("cu_seqlens and max_seqlen must be given together")
        return
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be integers of shape (B + 1,), was {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on {x.device} like {name}, was on {cu_seqlens.device}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_bounds(cu_seqlens.tolist(), max_seqlen, name, x.shape[0])


def _check_bounds(bounds: list[int], max_seqlen: int, name: str, total: int) -> None:
    """Every way in which they do not add up, in one message."""
    lengths = [end - start for start, end in pairwise(bounds)]
    wrong = [] if bounds[0] == 0 else [f"starts at {bounds[0]}, must start at 0"]
    if bounds[-1] != total:
        wrong.append(f"ends at {bounds[-1]}, must end at {total}, the rows of {name}")
    falls = [i for i, length in enumerate(lengths) if length < 0]
    if falls:
        wrong.append(f"falls from {bounds[falls[0]]} to {bounds[falls[0] + 1]} at position {falls[0]}, must rise")
    longest = max(lengths, default=0)
    if longest > max_seqlen:
        wrong.append(f"has a sequence of {longest} rows, more than max_seqlen = {max_seqlen}")
    if wrong:
        raise ValueError(f"cu_seqlens {'; '.join(wrong)}")
