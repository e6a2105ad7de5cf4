"""Multi-head attention on the product of one QKV matrix, dense or packed.

    O = softmax(softmax_scale * Q K^T) V    per sequence and head

`qkv` is (B, N, 3, H, D) for B sequences of N tokens, or (T, 3, H, D) for sequences laid end to end, where
`cu_seqlens` (B + 1,) int32 holds their bounds and `max_seqlen` the longest: FlashAttention's layout and names.
Implementations: `reference` (the specification), `sdpa` (PyTorch's fused kernels, on every device; the packed form is
padded for the call) and `cpu` (C++, short sequences, forward and backward straight on the packed product).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastclip.ops import _dispatch, _extension
from fastclip.ops.attention import cpu, reference, sdpa
from fastclip.ops.attention.packing import PackedText, pack_text

__all__ = ["PackedText", "attention", "explain", "pack_text", "pooled_attention"]

IMPLS: dict[str, ModuleType] = {"reference": reference, "sdpa": sdpa, "cpu": cpu}
SHORT = 256  # tokens up to which the C++ kernel's forward and backward beat SDPA's on the CPU


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
    impl: "auto", "reference", "sdpa" or "cpu".
    Raises ValueError for a shape or an option that does not fit, or an impl that cannot run here, with the reason.
    """
    _check("qkv", qkv, 3, cu_seqlens, max_seqlen)
    return _pick(impl, qkv, max_seqlen).attention(
        qkv, cu_seqlens, max_seqlen, causal=causal, softmax_scale=softmax_scale
    )


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
    return _pick(impl, kv, max_seqlen).pooled_attention(q, kv, cu_seqlens, max_seqlen, softmax_scale=softmax_scale)


def _order(device_type: str, length: int) -> tuple[str, ...]:
    """What "auto" tries, best first."""
    return ("cpu", "sdpa") if device_type == "cpu" and length <= SHORT else ("sdpa",)


def _why_not(impl: str, device_type: str, dtype: torch.dtype) -> str | None:
    """The reason `impl` cannot run on such tensors, or None."""
    if impl == "cpu":
        if device_type != "cpu":
            return f"the tensors are on {device_type}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it takes float32 and bfloat16, not {dtype}"
        return _compiled_kernels()
    return None


def _compiled_kernels() -> str | None:
    return _extension.load()


# What torch.compiler.assume_constant_result sets: torch.compile asks once and does not trace the library's loading.
# Set by hand because that function imports Dynamo (0.8 s), and importing fastclip must not.
_compiled_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _pick(impl: str, x: Tensor, max_seqlen: int | None) -> ModuleType:
    length = x.shape[1] if max_seqlen is None else max_seqlen
    kind, dtype = x.device.type, x.dtype
    order = _order(kind, length)
    return IMPLS[_dispatch.pick("attention", impl, tuple(IMPLS), order, lambda name: _why_not(name, kind, dtype))]


def explain(device_type: str, dtype: torch.dtype, length: int) -> list[_dispatch.Verdict]:
    """Which implementation "auto" takes for sequences of up to `length` tokens, and why not the others."""
    order = _order(device_type, length)
    return _dispatch.explain("attention", tuple(IMPLS), order, lambda name: _why_not(name, device_type, dtype))


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
