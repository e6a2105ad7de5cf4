"""Multi-head attention on the product of one QKV matrix, dense or packed.

    O = softmax(softmax_scale * Q K^T) V    per sequence and head

`qkv` is (B, N, 3, H, D) for B sequences of N tokens, or (T, 3, H, D) for sequences laid end to end, where
`cu_seqlens` (B + 1,) int32 holds their bounds and `max_seqlen` the longest: FlashAttention's layout and names.
Implementations: `reference` (the specification) and `sdpa` (PyTorch's fused kernels, on every device; the packed form
is padded for the call).
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from fastclip.ops.attention import reference, sdpa
from fastclip.ops.attention.packing import PackedText, pack_text

__all__ = ["PackedText", "attention", "pack_text", "pooled_attention"]

_IMPLS: dict[str, ModuleType] = {"auto": sdpa, "reference": reference, "sdpa": sdpa}


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
    impl: "auto", "reference" or "sdpa"; "auto" takes sdpa.
    Raises ValueError for a shape or an option that does not fit.
    """
    _check("qkv", qkv, 3, cu_seqlens, max_seqlen)
    return _pick(impl).attention(qkv, cu_seqlens, max_seqlen, causal=causal, softmax_scale=softmax_scale)


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
    return _pick(impl).pooled_attention(q, kv, cu_seqlens, max_seqlen, softmax_scale=softmax_scale)


def _pick(impl: str) -> ModuleType:
    if impl not in _IMPLS:
        raise ValueError(f"impl must be one of {', '.join(_IMPLS)}, was {impl!r}")
    return _IMPLS[impl]


def _check(name: str, x: Tensor, parts: int, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
    dims = 5 if cu_seqlens is None else 4
    if x.dim() != dims or x.shape[-3] != parts:
        expected = f"(B, N, {parts}, H, D)" if cu_seqlens is None else f"packed (T, {parts}, H, D)"
        raise ValueError(f"{name} must be {expected}, was {tuple(x.shape)}")
    if (cu_seqlens is None) != (max_seqlen is None):
        raise ValueError("cu_seqlens and max_seqlen must be given together")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point()):
        raise ValueError(
            f"cu_seqlens must be integers of shape (B + 1,), was {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
