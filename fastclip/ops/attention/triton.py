"""Triton kernels of attention: one program a (sequence, head), straight from packed QKV and back into packed dQKV.

Where the longest sequence fits into one tile (WHOLE), all of it is at hand at once: softmax needs no second pass and
the five products of the backward share their probabilities. Longer ones go block by block, forward with a running
softmax, backward once along the queries for dQ and once along the keys for dK and dV; the steps within are half a
block, because the class token makes CLIP's lengths one more than a multiple. No program writes what another writes: no
atomics, bitwise deterministic.

Tiles must be powers of two: a head of D dimensions is taken as D1 + D2 of them, so that 72 costs 80 and 88 costs 96.
Scores are in units of log2, products in fp32, probabilities rounded to the input's type for the second product.
"""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HEAD_DIMS = (64, 72, 80, 88, 104, 112, 128)  # those of published CLIP towers; others run too
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _bounds(cu_ptr, sequence, length):
    """First row and number of rows."""
    if cu_ptr is None:
        start, rows = sequence.to(tl.int64) * length, length
    else:
        first = tl.load(cu_ptr + sequence)
        start, rows = first.to(tl.int64), tl.load(cu_ptr + sequence + 1) - first
    return start, rows


@triton.jit
def _columns(ptr, offs_n, STRIDE: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    return ptr + offs_n[:, None] * STRIDE + (FIRST + tl.arange(0, SIZE))[None, :]


@triton.jit
def _inside(offs_n, n, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    mask = (offs_n < n)[:, None]
    if FIRST + SIZE > D:
        mask = mask & (FIRST + tl.arange(0, SIZE) < D)[None, :]
    return mask


@triton.jit
def _load(ptr, offs_n, n, STRIDE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Rows of one head in its parts, D1 and where it is not 0 D2; zero outside."""
    parts = (tl.load(_columns(ptr, offs_n, STRIDE, 0, D1), mask=_inside(offs_n, n, D, 0, D1), other=0.0),)
    if D2 > 0:
        more = tl.load(_columns(ptr, offs_n, STRIDE, D1, D2), mask=_inside(offs_n, n, D, D1, D2), other=0.0)
        parts = (parts[0], more)  # type: ignore[assignment]
    return parts


@triton.jit
def _store(ptr, x, offs_n, n, STRIDE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    kind = ptr.dtype.element_ty
    tl.store(_columns(ptr, offs_n, STRIDE, 0, D1), x[0].to(kind), mask=_inside(offs_n, n, D, 0, D1))
    if D2 > 0:
        tl.store(_columns(ptr, offs_n, STRIDE, D1, D2), x[1].to(kind), mask=_inside(offs_n, n, D, D1, D2))


@triton.jit
def _zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    parts = (tl.zeros((ROWS, D1), tl.float32),)
    if D2 > 0:
        parts = (parts[0], tl.zeros((ROWS, D2), tl.float32))  # type: ignore[assignment]
    return parts


@triton.jit
def _inner(x, y, D2: tl.constexpr):
    """x y^T over the dimensions of the head: (X, Y)."""
    total = tl.dot(x[0], y[0].T, input_precision="ieee")
    if D2 > 0:
        total = tl.dot(x[1], y[1].T, total, input_precision="ieee")
    return total


@triton.jit
def _add_product(total, weights, x, D2: tl.constexpr):
    """total + weights x: (X, Y) times (Y, D)."""
    weights = weights.to(x[0].dtype)
    parts = (tl.dot(weights, x[0], total[0], input_precision="ieee"),)
    if D2 > 0:
        parts = (parts[0], tl.dot(weights, x[1], total[1], input_precision="ieee"))  # type: ignore[assignment]
    return parts


@triton.jit
def _times(x, factor, D2: tl.constexpr):
    parts = (x[0] * factor,)
    if D2 > 0:
        parts = (parts[0], x[1] * factor)  # type: ignore[assignment]
    return parts


@triton.jit
def _hidden(offs_m, offs_n, n, CAUSAL: tl.constexpr):
    """Where a query must not look."""
    hidden = (offs_n >= n)[None, :]
    if CAUSAL:
        hidden = hidden | (offs_n[None, :] > offs_m[:, None])
    return hidden


@triton.jit
def _fold(
    state, q, k_ptr, start_n, offs_m, n, log2_scale,
    CAUSAL: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The running (max, sum, P V) of a block of queries with STEP keys folded in."""
    offs_n = start_n + tl.arange(0, STEP)
    k = _load(k_ptr, offs_n, n, 3 * H * D, D, D1, D2)
    v = _load(k_ptr + H * D, offs_n, n, 3 * H * D, D, D1, D2)
    highest, total, out = state
    scores = _inner(q, k, D2) * log2_scale
    scores = tl.where(_hidden(offs_m, offs_n, n, CAUSAL), float("-inf"), scores)
    top = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - top[:, None])
    shrink = tl.exp2(highest - top)
    total = total * shrink + tl.sum(weights, 1)
    return top, total, _add_product(_times(out, shrink[:, None], D2), weights, v, D2)


@triton.jit
def _fwd_kernel(
    qkv_ptr, cu_ptr, out_ptr, lse_ptr, length, total, scale, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out (T, H, D) and lse (H, T), in units of log2, of one sequence and head."""
    head, sequence = tl.program_id(0) % H, tl.program_id(0) // H
    start, n = _bounds(cu_ptr, sequence, length)
    qkv_ptr += start * (3 * H * D) + head * D
    out_ptr += start * (H * D) + head * D
    lse_ptr += head.to(tl.int64) * total + start
    for start_m in range(0, n, BLOCK):  # one round where WHOLE, none for an empty sequence
        offs_m = start_m + tl.arange(0, BLOCK)
        q = _load(qkv_ptr, offs_m, n, 3 * H * D, D, D1, D2)
        state = (tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32), _zeros(BLOCK, D1, D2))
        if WHOLE:
            state = _fold(state, q, qkv_ptr + H * D, 0, offs_m, n, scale * LOG2E, CAUSAL, H, D, D1, D2, STEP)
        else:
            for start_n in range(0, tl.minimum(n, start_m + BLOCK) if CAUSAL else n, STEP):
                state = _fold(state, q, qkv_ptr + H * D, start_n, offs_m, n, scale * LOG2E, CAUSAL, H, D, D1, D2, STEP)
        highest, sums, out = state
        _store(out_ptr, _times(out, (1.0 / sums)[:, None], D2), offs_m, n, H * D, D, D1, D2)
        tl.store(lse_ptr + offs_m, highest + tl.log2(sums), mask=offs_m < n)


@triton.jit
def _bwd_whole(
    d_out_ptr, qkv_ptr, d_qkv_ptr, n, scale, CAUSAL: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of a sequence of at most ROWS rows."""
    offs = tl.arange(0, ROWS)
    q = _load(qkv_ptr, offs, n, 3 * H * D, D, D1, D2)
    k = _load(qkv_ptr + H * D, offs, n, 3 * H * D, D, D1, D2)
    scores = _inner(q, k, D2) * (scale * LOG2E)
    scores = tl.where(_hidden(offs, offs, n, CAUSAL), float("-inf"), scores)
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    d_out = _load(d_out_ptr, offs, n, H * D, D, D1, D2)
    d_v = _add_product(_zeros(ROWS, D1, D2), weights.T, d_out, D2)
    _store(d_qkv_ptr + 2 * H * D, d_v, offs, n, 3 * H * D, D, D1, D2)
    d_weights = _inner(d_out, _load(qkv_ptr + 2 * H * D, offs, n, 3 * H * D, D, D1, D2), D2)
    delta = tl.sum(weights * d_weights, 1)
    d_scores = weights * (d_weights - delta[:, None]) * scale
    d_q = _add_product(_zeros(ROWS, D1, D2), d_scores, k, D2)
    _store(d_qkv_ptr, d_q, offs, n, 3 * H * D, D, D1, D2)
    d_k = _add_product(_zeros(ROWS, D1, D2), d_scores.T, q, D2)
    _store(d_qkv_ptr + H * D, d_k, offs, n, 3 * H * D, D, D1, D2)


@triton.jit
def _bwd_queries(
    d_out_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, d_qkv_ptr, start_m, n, scale, CAUSAL: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK queries from start_m on, and delta = sum(dO * O) for the pass along the keys."""
    offs_m = start_m + tl.arange(0, BLOCK)
    q = _load(qkv_ptr, offs_m, n, 3 * H * D, D, D1, D2)
    d_out, out = _load(d_out_ptr, offs_m, n, H * D, D, D1, D2), _load(out_ptr, offs_m, n, H * D, D, D1, D2)
    delta = tl.sum(d_out[0].to(tl.float32) * out[0].to(tl.float32), 1)
    if D2 > 0:
        delta += tl.sum(d_out[1].to(tl.float32) * out[1].to(tl.float32), 1)
    tl.store(delta_ptr + offs_m, delta, mask=offs_m < n)
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < n, other=float("inf"))
    d_q = _zeros(BLOCK, D1, D2)
    for start_n in range(0, tl.minimum(n, start_m + BLOCK) if CAUSAL else n, STEP):
        offs_n = start_n + tl.arange(0, STEP)
        k = _load(qkv_ptr + H * D, offs_n, n, 3 * H * D, D, D1, D2)
        v = _load(qkv_ptr + 2 * H * D, offs_n, n, 3 * H * D, D, D1, D2)
        weights = tl.exp2(_inner(q, k, D2) * (scale * LOG2E) - lse[:, None])
        weights = tl.where(_hidden(offs_m, offs_n, n, CAUSAL), 0.0, weights)
        d_q = _add_product(d_q, weights * (_inner(d_out, v, D2) - delta[:, None]), k, D2)
    _store(d_qkv_ptr, _times(d_q, scale, D2), offs_m, n, 3 * H * D, D, D1, D2)


@triton.jit
def _bwd_keys(
    d_out_ptr, qkv_ptr, lse_ptr, delta_ptr, d_qkv_ptr, start_n, n, scale, CAUSAL: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK keys from start_n on; scores and weights are transposed here: (keys, queries)."""
    offs_n = start_n + tl.arange(0, BLOCK)
    k = _load(qkv_ptr + H * D, offs_n, n, 3 * H * D, D, D1, D2)
    v = _load(qkv_ptr + 2 * H * D, offs_n, n, 3 * H * D, D, D1, D2)
    d_k, d_v = _zeros(BLOCK, D1, D2), _zeros(BLOCK, D1, D2)
    for start_m in range(start_n if CAUSAL else 0, n, STEP):
        offs_m = start_m + tl.arange(0, STEP)
        q = _load(qkv_ptr, offs_m, n, 3 * H * D, D, D1, D2)
        d_out = _load(d_out_ptr, offs_m, n, H * D, D, D1, D2)
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < n, other=float("inf"))
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < n, other=0.0)
        weights = tl.exp2(_inner(k, q, D2) * (scale * LOG2E) - lse[None, :])
        if CAUSAL:
            weights = tl.where(offs_n[:, None] > offs_m[None, :], 0.0, weights)
        d_v = _add_product(d_v, weights, d_out, D2)
        d_k = _add_product(d_k, weights * (_inner(v, d_out, D2) - delta[None, :]), q, D2)
    _store(d_qkv_ptr + H * D, _times(d_k, scale, D2), offs_n, n, 3 * H * D, D, D1, D2)
    _store(d_qkv_ptr + 2 * H * D, d_v, offs_n, n, 3 * H * D, D, D1, D2)


@triton.jit
def _bwd_kernel(
    d_out_ptr, qkv_ptr, out_ptr, lse_ptr, cu_ptr, delta_ptr, d_qkv_ptr, length, total, scale,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """d_qkv (T, 3, H, D) of one sequence and head; delta (H, T) is scratch."""
    head, sequence = tl.program_id(0) % H, tl.program_id(0) // H
    start, n = _bounds(cu_ptr, sequence, length)
    qkv_ptr += start * (3 * H * D) + head * D
    d_qkv_ptr += start * (3 * H * D) + head * D
    d_out_ptr += start * (H * D) + head * D
    if WHOLE:
        if n > 0:
            _bwd_whole(d_out_ptr, qkv_ptr, d_qkv_ptr, n, scale, CAUSAL, H, D, D1, D2, BLOCK)
    else:
        out_ptr += start * (H * D) + head * D
        lse_ptr += head.to(tl.int64) * total + start
        delta_ptr += head.to(tl.int64) * total + start
        for start_m in range(0, n, BLOCK):
            _bwd_queries(
                d_out_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, d_qkv_ptr, start_m, n, scale,
                CAUSAL, H, D, D1, D2, BLOCK, STEP,
            )  # fmt: skip
        tl.debug_barrier()  # delta was written by other threads of this program
        for start_n in range(0, n, BLOCK):
            _bwd_keys(
                d_out_ptr, qkv_ptr, lse_ptr, delta_ptr, d_qkv_ptr, start_n, n, scale,
                CAUSAL, H, D, D1, D2, BLOCK, STEP,
            )  # fmt: skip


INTERPRETED = not isinstance(_fwd_kernel, triton.JITFunction)


@dataclass(frozen=True)
class Tiles:
    """Launch configuration: rows of a block, rows of a step within, and how it is run."""

    block: int
    step: int
    whole: bool
    num_warps: int
    num_stages: int


def _parts(head_dim: int) -> tuple[int, int]:
    """(D1, D2), the tiles that hold a head."""
    if 64 < head_dim <= 96:
        return 64, 16 if head_dim <= 80 else 32
    return max(16, triton.next_power_of_2(head_dim)), 0


def _tiles(dtype: torch.dtype, head_dim: int, longest: int, average: float, causal: bool, is_backward: bool) -> Tiles:
    """For sequences of up to `longest` rows; each of its results compiles for sm_80, sm_90 and sm_100 without a spill.

    One tile where all fit, but small blocks where most sequences are far shorter than the longest (packed captions).
    """
    single = dtype == torch.float32
    block = 16 if single else 32 if average <= 32 and head_dim <= 64 else 64
    largest = (16 if is_backward else 32, 64 if is_backward and not causal else 128) if head_dim <= 64 else (16, 64)
    if longest <= min(largest[not single], 2 * block):
        tile = max(16, triton.next_power_of_2(longest))
        warps = 8 if is_backward and tile == 64 else max(1, tile // 16)
        return Tiles(tile, tile, True, num_warps=4 if single else warps, num_stages=1)
    if single:
        rows = 32 if 80 < head_dim <= 96 and not is_backward else block
        return Tiles(rows, block, False, num_warps=4 if head_dim <= 96 else 8, num_stages=1)
    if is_backward and head_dim > 64:
        return Tiles(block, 32, False, num_warps=8, num_stages=1)
    return Tiles(block, 32, False, num_warps=4, num_stages=2 if block == 64 else 1)


def _constants(causal: bool, heads: int, head_dim: int, tiles: Tiles) -> dict[str, Any]:
    d1, d2 = _parts(head_dim)
    blocks = {"BLOCK": tiles.block, "STEP": tiles.step, "WHOLE": tiles.whole}
    return {"CAUSAL": causal, "H": heads, "D": head_dim, "D1": d1, "D2": d2} | blocks


def _plan(
    x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, causal: bool, is_backward: bool
) -> tuple[int, dict[str, Any]]:
    """How many programs, and the arguments that all kernels share."""
    total, _, heads, head_dim = x.shape
    sequences = (total // max_seqlen if max_seqlen else 0) if cu_seqlens is None else cu_seqlens.numel() - 1
    tiles = _tiles(x.dtype, head_dim, max_seqlen, total / max(sequences, 1), causal, is_backward)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return sequences * heads, _constants(causal, heads, head_dim, tiles) | options


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def attention_fwd(
    qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Packed (T, 3, H, D) -> (T, H, D), and the lse (H, T) in units of log2."""
    qkv = qkv.contiguous()
    total, _, heads, head_dim = qkv.shape
    out, lse = qkv.new_empty(total, heads, head_dim), qkv.new_empty((heads, total), dtype=torch.float32)
    programs, arguments = _plan(qkv, cu_seqlens, max_seqlen, causal, is_backward=False)
    if programs and total:
        with _on(qkv.device):
            _fwd_kernel[(programs,)](qkv, cu_seqlens, out, lse, max_seqlen, total, softmax_scale, **arguments)
    return out, lse


def attention_bwd(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    causal: bool,
    softmax_scale: float,
) -> Tensor:
    """The gradient for qkv: (T, 3, H, D)."""
    qkv, d_out = qkv.contiguous(), d_out.contiguous()
    d_qkv, delta, total = torch.empty_like(qkv), torch.empty_like(lse), qkv.shape[0]
    programs, arguments = _plan(qkv, cu_seqlens, max_seqlen, causal, is_backward=True)
    if programs and total:
        with _on(qkv.device):
            _bwd_kernel[(programs,)](
                d_out, qkv, out, lse, cu_seqlens, delta, d_qkv, max_seqlen, total, softmax_scale, **arguments
            )
    return d_qkv


def configurations() -> list[dict[str, Any]]:
    """Every kernel in the launch configurations of published towers, as `fastclip.testing.compile_offline` takes them.

    Causal ones have heads of 64 dimensions and bounds, the others are dense. float16 runs the code of bfloat16.
    """
    cases = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for head_dim, causal in [*itertools.product(HEAD_DIMS, (False,)), (64, True)]:
            for longest, average in ((20, 20), (50, 50), (77, 77), (257, 257), *(((77, 16),) if causal else ())):
                for kernel in (_fwd_kernel, _bwd_kernel):
                    tiles = _tiles(dtype, head_dim, longest, average, causal, kernel is _bwd_kernel)
                    special = {"cu_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32"}
                    pointer = f"*{name}"
                    types = {x: special.get(x, pointer if x.endswith("_ptr") else "i32") for x in kernel.arg_names}
                    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
                    constants = _constants(causal, 8, head_dim, tiles) | ({} if causal else {"cu_ptr": None})
                    case = {"kernel": kernel, "types": types, "constants": constants, "options": options}
                    cases[kernel, dtype, head_dim, causal, tiles] = case
    return list(cases.values())
