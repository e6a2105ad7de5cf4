"""Triton kernels of pooled attention: one query a sequence, one program a (sequence, head), no matrix product in it.

A query reads its keys and values once forward and twice backward; nothing is kept but the input, and no program writes
what another writes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.ops.attention.triton import HEAD_DIMS, _on
from fastclip.ops.attention.triton_tiles import LOG2E, _bounds

BLOCK = 32  # keys at a time
NUM_WARPS = 4


@triton.jit
def _rows(ptr, offs_n, n, offs_d, STRIDE: tl.constexpr, D: tl.constexpr):
    mask = (offs_n < n)[:, None] & (offs_d < D)[None, :]
    return tl.load(ptr + offs_n[:, None] * STRIDE + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _scores(q, k, offs_n, n, scale):
    """In units of log2."""
    return tl.where(offs_n < n, tl.sum(q[None, :] * k, 1) * (scale * LOG2E), float("-inf"))


@triton.jit
def _pooled_fwd_kernel(
    q_ptr, kv_ptr, cu_ptr, out_ptr, length, scale,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (B, H, D); zero for a sequence without keys."""
    head, sequence = tl.program_id(0) % H, tl.program_id(0) // H
    start, n = _bounds(cu_ptr, sequence, length)
    kv_ptr += start * (2 * H * D) + head * D
    offs_d = tl.arange(0, WIDTH)
    own = sequence.to(tl.int64) * (H * D) + head * D + offs_d
    q = tl.load(q_ptr + own, mask=offs_d < D, other=0.0).to(tl.float32)
    highest, total = -float("inf"), 0.0
    out = tl.zeros((WIDTH,), tl.float32)
    for start_n in range(0, n, BLOCK):
        offs_n = start_n + tl.arange(0, BLOCK)
        scores = _scores(q, _rows(kv_ptr, offs_n, n, offs_d, 2 * H * D, D), offs_n, n, scale)
        top = tl.maximum(highest, tl.max(scores, 0))
        weights, shrink = tl.exp2(scores - top), tl.exp2(highest - top)
        total = total * shrink + tl.sum(weights, 0)
        values = _rows(kv_ptr + H * D, offs_n, n, offs_d, 2 * H * D, D)
        out = out * shrink + tl.sum(weights[:, None] * values, 0)
        highest = top
    out = tl.where(n > 0, out / total, 0.0)
    tl.store(out_ptr + own, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)


@triton.jit
def _pooled_bwd_kernel(
    d_out_ptr, q_ptr, kv_ptr, cu_ptr, d_q_ptr, d_kv_ptr, length, scale,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_q (B, H, D) and d_kv (T, 2, H, D)."""
    head, sequence = tl.program_id(0) % H, tl.program_id(0) // H
    start, n = _bounds(cu_ptr, sequence, length)
    kv_ptr += start * (2 * H * D) + head * D
    d_kv_ptr += start * (2 * H * D) + head * D
    offs_d = tl.arange(0, WIDTH)
    own = sequence.to(tl.int64) * (H * D) + head * D + offs_d
    q = tl.load(q_ptr + own, mask=offs_d < D, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + own, mask=offs_d < D, other=0.0).to(tl.float32)
    highest, total, delta = -float("inf"), 0.0, 0.0  # delta: sum of weights * d_weights
    for start_n in range(0, n, BLOCK):
        offs_n = start_n + tl.arange(0, BLOCK)
        scores = _scores(q, _rows(kv_ptr, offs_n, n, offs_d, 2 * H * D, D), offs_n, n, scale)
        d_weights = tl.sum(d_out[None, :] * _rows(kv_ptr + H * D, offs_n, n, offs_d, 2 * H * D, D), 1)
        top = tl.maximum(highest, tl.max(scores, 0))
        weights, shrink = tl.exp2(scores - top), tl.exp2(highest - top)
        total = total * shrink + tl.sum(weights, 0)
        delta = delta * shrink + tl.sum(weights * d_weights, 0)
        highest = top
    d_q = tl.zeros((WIDTH,), tl.float32)
    for start_n in range(0, n, BLOCK):
        offs_n = start_n + tl.arange(0, BLOCK)
        k = _rows(kv_ptr, offs_n, n, offs_d, 2 * H * D, D)
        weights = tl.exp2(_scores(q, k, offs_n, n, scale) - highest) / total
        d_weights = tl.sum(d_out[None, :] * _rows(kv_ptr + H * D, offs_n, n, offs_d, 2 * H * D, D), 1)
        d_scores = weights * (d_weights - delta / total) * scale
        d_q += tl.sum(d_scores[:, None] * k, 0)
        rows = d_kv_ptr + offs_n[:, None] * (2 * H * D) + offs_d[None, :]
        mask = (offs_n < n)[:, None] & (offs_d < D)[None, :]
        tl.store(rows, (d_scores[:, None] * q[None, :]).to(d_kv_ptr.dtype.element_ty), mask=mask)
        tl.store(rows + H * D, (weights[:, None] * d_out[None, :]).to(d_kv_ptr.dtype.element_ty), mask=mask)
    tl.store(d_q_ptr + own, d_q.to(d_q_ptr.dtype.element_ty), mask=offs_d < D)


def _constants(heads: int, head_dim: int) -> dict[str, int]:
    return {"H": heads, "D": head_dim, "WIDTH": triton.next_power_of_2(head_dim), "BLOCK": BLOCK}


def pooled_attention_fwd(
    q: Tensor, kv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, softmax_scale: float
) -> Tensor:
    """(B, H, D) queries over packed (T, 2, H, D) -> (B, H, D)."""
    q, kv = q.contiguous(), kv.contiguous()
    (batch, heads, head_dim), out = q.shape, torch.empty_like(q)
    if batch:
        with _on(q.device):
            _pooled_fwd_kernel[(batch * heads,)](
                q, kv, cu_seqlens, out, max_seqlen, softmax_scale, **_constants(heads, head_dim), num_warps=NUM_WARPS
            )
    return out


def pooled_attention_bwd(
    d_out: Tensor, q: Tensor, kv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients for q and kv."""
    d_out, q, kv = d_out.contiguous(), q.contiguous(), kv.contiguous()
    (batch, heads, head_dim), d_q, d_kv = q.shape, torch.empty_like(q), torch.empty_like(kv)
    if batch:
        constants = _constants(heads, head_dim)
        with _on(q.device):
            _pooled_bwd_kernel[(batch * heads,)](
                d_out, q, kv, cu_seqlens, d_q, d_kv, max_seqlen, softmax_scale, **constants, num_warps=NUM_WARPS
            )
    return d_q, d_kv


def configurations() -> list[dict[str, Any]]:
    """Every kernel in its launch configurations, as `fastclip.testing.compile_offline` takes them."""
    cases = []
    for kernel in (_pooled_fwd_kernel, _pooled_bwd_kernel):
        for name in ("bf16", "fp32"):
            for head_dim in HEAD_DIMS:
                special = {"cu_ptr": "*i32", "scale": "fp32"}
                types = {x: special.get(x, f"*{name}" if x.endswith("_ptr") else "i32") for x in kernel.arg_names}
                options = {"num_warps": NUM_WARPS, "num_stages": 2}
                constants = _constants(8, head_dim)
                cases.append({"kernel": kernel, "types": types, "constants": constants, "options": options})
    return cases
