"""The Triton kernels of attention: straight from packed QKV and back into packed dQKV.

Where a sequence fits into one tile (WHOLE), all of it is at hand at once: softmax needs no second pass and the five
products of the backward share their probabilities. Longer ones go block by block, forward with a running softmax,
backward once along the queries for dQ and once along the keys for dK and dV; packed ones choose between this and one
tile on their own. In long dense sequences every block is a program, and both passes of the backward are launches: a
program that does one thing holds half the registers, so that twice as many run at once. No program writes what another
writes: no atomics, bitwise deterministic.

The class token makes CLIP's lengths one more than a multiple: the rest of a sequence has a smaller step (LAST) and a
smaller block (TAIL). In heads of up to 64 dimensions this step comes first and is read along with the block.

Scores are in units of log2, products in fp32, probabilities rounded to the input's type for the second product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastclip.ops.attention.triton_tiles import (
    LOG2E,
    _add_product,
    _bounds,
    _hide,
    _inner,
    _load,
    _load_row,
    _row_inner,
    _store,
    _times,
    _zeros,
)


@triton.jit
def _fold_keys(
    state, q, k_ptr, offs_m, offs_n, n, scale,
    CAUSAL: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """The running (max, sum, P V) of a block of queries with what a step of keys gives."""
    k = _load(k_ptr, offs_n, n, 3 * H * D, D, D1, D2)
    v = _load(k_ptr + H * D, offs_n, n, 3 * H * D, D, D1, D2)
    highest, total, out = state
    scores = _hide(_inner(q, k, D2) * (scale * LOG2E), float("-inf"), offs_m, offs_n, n, CAUSAL)
    top = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - top[:, None])
    shrink = tl.exp2(highest - top)
    total = total * shrink + tl.sum(weights, 1)
    return top, total, _add_product(_times(out, shrink[:, None], D2), weights, v, D2)


@triton.jit
def _fwd_block(
    qkv_ptr, out_ptr, lse_ptr, start_m, n, scale, CAUSAL: tl.constexpr, WHOLE: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK queries from start_m on; keys that none must miss go in steps without a mask."""
    offs_m, k_ptr = start_m + tl.arange(0, BLOCK), qkv_ptr + H * D
    q = _load(qkv_ptr, offs_m, n, 3 * H * D, D, D1, D2)
    state = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32), _zeros(BLOCK, D1, D2)
    if WHOLE:
        state = _fold_keys(state, q, k_ptr, offs_m, offs_m, n, scale, CAUSAL, H, D, D1, D2)
    else:
        if LAST < STEP and D <= 64:
            rest = n // STEP * STEP + tl.arange(0, LAST)
            state = _fold_keys(state, q, k_ptr, offs_m, rest, n, scale, False, H, D, D1, D2)
        seen = (start_m if CAUSAL else n) // STEP * STEP  # by all of these queries
        for start_n in range(0, seen, STEP):
            offs_n = start_n + tl.arange(0, STEP)
            state = _fold_keys(state, q, k_ptr, offs_m, offs_n, None, scale, False, H, D, D1, D2)
        if LAST == STEP or D > 64:
            for start_n in range(seen, tl.minimum(n, start_m + BLOCK) if CAUSAL else n, LAST):
                offs_n = start_n + tl.arange(0, LAST)
                state = _fold_keys(state, q, k_ptr, offs_m, offs_n, n, scale, CAUSAL, H, D, D1, D2)
    highest, sums, out = state
    _store(out_ptr, _times(out, (1.0 / sums)[:, None], D2), offs_m, n, H * D, D, D1, D2)
    tl.store(lse_ptr + offs_m, highest + tl.log2(sums), mask=offs_m < n)


@triton.jit
def _fwd_kernel(
    qkv_ptr, cu_ptr, out_ptr, lse_ptr, length, total, scale, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
    PARTS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr, STEP: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """out (T, H, D) and lse (H, T), in units of log2, of one sequence and head, or of one of its PARTS blocks."""
    head, part = tl.program_id(0) % H, tl.program_id(0) // H
    start, n = _bounds(cu_ptr, part // PARTS, length)
    qkv_ptr += start * (3 * H * D) + head * D
    out_ptr += start * (H * D) + head * D
    lse_ptr += head.to(tl.int64) * total + start
    first = part % PARTS * BLOCK
    if TAIL > 0 and first + BLOCK > n:
        _fwd_block(
            qkv_ptr, out_ptr, lse_ptr, first, n, scale, CAUSAL, False, H, D, D1, D2, TAIL, STEP, LAST
        )  # fmt: skip
    else:
        end = n if PARTS == 1 else tl.minimum(n, first + BLOCK)
        for start_m in range(first, end, BLOCK):  # none for an empty sequence
            _fwd_block(
                qkv_ptr, out_ptr, lse_ptr, start_m, n, scale, CAUSAL, WHOLE, H, D, D1, D2, BLOCK, STEP, LAST
            )  # fmt: skip


@triton.jit
def _bwd_whole(
    d_out_ptr, qkv_ptr, d_qkv_ptr, n, scale, CAUSAL: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of a sequence of at most ROWS rows."""
    offs = tl.arange(0, ROWS)
    q = _load(qkv_ptr, offs, n, 3 * H * D, D, D1, D2)
    k = _load(qkv_ptr + H * D, offs, n, 3 * H * D, D, D1, D2)
    d_out = _load(d_out_ptr, offs, n, H * D, D, D1, D2)
    v = _load(qkv_ptr + 2 * H * D, offs, n, 3 * H * D, D, D1, D2)
    scores = _hide(_inner(q, k, D2) * (scale * LOG2E), float("-inf"), offs, offs, n, CAUSAL)
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    weights = weights * (1.0 / tl.sum(weights, 1))[:, None]
    d_v = _add_product(_zeros(ROWS, D1, D2), weights.T, d_out, D2)
    _store(d_qkv_ptr + 2 * H * D, d_v, offs, n, 3 * H * D, D, D1, D2)
    d_weights = _inner(d_out, v, D2)
    delta = tl.sum(weights * d_weights, 1)
    d_scores = (weights * (d_weights - delta[:, None]) * scale).to(q[0].dtype)
    d_q = _add_product(_zeros(ROWS, D1, D2), d_scores, k, D2)
    _store(d_qkv_ptr, d_q, offs, n, 3 * H * D, D, D1, D2)
    d_k = _add_product(_zeros(ROWS, D1, D2), d_scores.T, q, D2)
    _store(d_qkv_ptr + H * D, d_k, offs, n, 3 * H * D, D, D1, D2)


@triton.jit
def _add_d_q(
    d_q, q, d_out, lse, delta, k_ptr, offs_m, offs_n, n, scale,
    CAUSAL: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries with what a step of keys gives."""
    k = _load(k_ptr, offs_n, n, 3 * H * D, D, D1, D2)
    v = _load(k_ptr + H * D, offs_n, n, 3 * H * D, D, D1, D2)
    weights = tl.exp2(_inner(q, k, D2) * (scale * LOG2E) - lse[:, None])
    weights = _hide(weights, 0.0, offs_m, offs_n, n, CAUSAL)
    less = tl.broadcast_to(-delta[:, None], weights.shape)
    return _add_product(d_q, weights * _inner(d_out, v, D2, less), k, D2)


@triton.jit
def _bwd_queries(
    d_out_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, d_qkv_ptr, start_m, n, scale, CAUSAL: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK queries from start_m on, and delta = sum(dO * O) for the pass along the keys."""
    offs_m = start_m + tl.arange(0, BLOCK)
    q = _load(qkv_ptr, offs_m, n, 3 * H * D, D, D1, D2)
    d_out, out = _load(d_out_ptr, offs_m, n, H * D, D, D1, D2), _load(out_ptr, offs_m, n, H * D, D, D1, D2)
    delta = _row_inner(d_out, out, D2)
    tl.store(delta_ptr + offs_m, delta, mask=offs_m < n)
    lse, d_q, k_ptr = _load_row(lse_ptr, offs_m, n, float("inf")), _zeros(BLOCK, D1, D2), qkv_ptr + H * D
    if LAST < STEP and D <= 64:
        rest = n // STEP * STEP + tl.arange(0, LAST)
        d_q = _add_d_q(d_q, q, d_out, lse, delta, k_ptr, offs_m, rest, n, scale, False, H, D, D1, D2)
    seen = (start_m if CAUSAL else n) // STEP * STEP  # by all of these queries
    for start_n in range(0, seen, STEP):
        offs_n = start_n + tl.arange(0, STEP)
        d_q = _add_d_q(d_q, q, d_out, lse, delta, k_ptr, offs_m, offs_n, None, scale, False, H, D, D1, D2)
    if LAST == STEP or D > 64:
        for start_n in range(seen, tl.minimum(n, start_m + BLOCK) if CAUSAL else n, LAST):
            offs_n = start_n + tl.arange(0, LAST)
            d_q = _add_d_q(d_q, q, d_out, lse, delta, k_ptr, offs_m, offs_n, n, scale, CAUSAL, H, D, D1, D2)
    _store(d_qkv_ptr, _times(d_q, scale, D2), offs_m, n, 3 * H * D, D, D1, D2)


@triton.jit
def _add_d_kv(
    d_k, d_v, k, v, d_out_ptr, q_ptr, lse_ptr, delta_ptr, offs_m, offs_n, n, scale,
    CAUSAL: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys with what a step of queries gives; scores are transposed here: (keys, queries)."""
    q, d_out = _load(q_ptr, offs_m, n, 3 * H * D, D, D1, D2), _load(d_out_ptr, offs_m, n, H * D, D, D1, D2)
    lse, delta = _load_row(lse_ptr, offs_m, n, float("inf")), _load_row(delta_ptr, offs_m, n, 0.0)
    weights = tl.exp2(_inner(k, q, D2) * (scale * LOG2E) - lse[None, :])
    if CAUSAL:
        weights = tl.where(offs_n[:, None] > offs_m[None, :], 0.0, weights)
    d_v = _add_product(d_v, weights, d_out, D2)
    less = tl.broadcast_to(-delta[None, :], weights.shape)
    return _add_product(d_k, weights * _inner(v, d_out, D2, less), q, D2), d_v


@triton.jit
def _bwd_keys(
    d_out_ptr, qkv_ptr, lse_ptr, delta_ptr, d_qkv_ptr, start_n, n, scale, CAUSAL: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK keys from start_n on."""
    offs_n = start_n + tl.arange(0, BLOCK)
    k = _load(qkv_ptr + H * D, offs_n, n, 3 * H * D, D, D1, D2)
    v = _load(qkv_ptr + 2 * H * D, offs_n, n, 3 * H * D, D, D1, D2)
    d_k, d_v = _zeros(BLOCK, D1, D2), _zeros(BLOCK, D1, D2)
    full = n // STEP * STEP
    if LAST < STEP and D <= 64:
        d_k, d_v = _add_d_kv(
            d_k, d_v, k, v, d_out_ptr, qkv_ptr, lse_ptr, delta_ptr, full + tl.arange(0, LAST), offs_n, n, scale,
            False, H, D, D1, D2,
        )  # fmt: skip
    for start_m in range(start_n if CAUSAL else 0, full, STEP):
        d_k, d_v = _add_d_kv(
            d_k, d_v, k, v, d_out_ptr + start_m * (H * D), qkv_ptr + start_m * (3 * H * D), lse_ptr + start_m,
            delta_ptr + start_m, tl.arange(0, STEP), offs_n - start_m, None, scale, CAUSAL, H, D, D1, D2,
        )  # fmt: skip
    if LAST == STEP or D > 64:
        for start_m in range(full, n, LAST):
            d_k, d_v = _add_d_kv(
                d_k, d_v, k, v, d_out_ptr, qkv_ptr, lse_ptr, delta_ptr, start_m + tl.arange(0, LAST), offs_n, n, scale,
                CAUSAL, H, D, D1, D2,
            )  # fmt: skip
    _store(d_qkv_ptr + H * D, _times(d_k, scale, D2), offs_n, n, 3 * H * D, D, D1, D2)
    _store(d_qkv_ptr + 2 * H * D, d_v, offs_n, n, 3 * H * D, D, D1, D2)


@triton.jit
def _bwd_blocks(
    d_out_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, d_qkv_ptr, n, scale, CAUSAL: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of a sequence of any length; delta is scratch."""
    for start_m in range(0, n, BLOCK):
        _bwd_queries(
            d_out_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, d_qkv_ptr, start_m, n, scale,
            CAUSAL, H, D, D1, D2, BLOCK, STEP, LAST,
        )  # fmt: skip
    tl.debug_barrier()  # delta was written by other threads of this program
    for start_n in range(0, n, BLOCK):
        _bwd_keys(
            d_out_ptr, qkv_ptr, lse_ptr, delta_ptr, d_qkv_ptr, start_n, n, scale,
            CAUSAL, H, D, D1, D2, BLOCK, STEP, LAST,
        )  # fmt: skip


@triton.jit
def _bwd_kernel(
    d_out_ptr, qkv_ptr, out_ptr, lse_ptr, cu_ptr, delta_ptr, d_qkv_ptr, length, total, scale, CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr, ALONG: tl.constexpr, PARTS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, STEP: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """d_qkv (T, 3, H, D) of one sequence and head, or ALONG "queries" or "keys" of one of its PARTS blocks.

    delta (H, T) is scratch; along the keys it is what the launch along the queries left there.
    """
    head, part = tl.program_id(0) % H, tl.program_id(0) // H
    start, n = _bounds(cu_ptr, part // PARTS, length)
    qkv_ptr += start * (3 * H * D) + head * D
    d_qkv_ptr += start * (3 * H * D) + head * D
    d_out_ptr += start * (H * D) + head * D
    out_ptr += start * (H * D) + head * D
    lse_ptr += head.to(tl.int64) * total + start
    delta_ptr += head.to(tl.int64) * total + start
    first = part % PARTS * BLOCK
    if ALONG == "queries":
        if TAIL > 0 and first + BLOCK > n:
            _bwd_queries(
                d_out_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, d_qkv_ptr, first, n, scale,
                CAUSAL, H, D, D1, D2, TAIL, STEP, LAST,
            )  # fmt: skip
        else:
            _bwd_queries(
                d_out_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, d_qkv_ptr, first, n, scale,
                CAUSAL, H, D, D1, D2, BLOCK, STEP, LAST,
            )  # fmt: skip
    elif ALONG == "keys":
        if TAIL > 0 and first + BLOCK > n:
            _bwd_keys(
                d_out_ptr, qkv_ptr, lse_ptr, delta_ptr, d_qkv_ptr, first, n, scale,
                CAUSAL, H, D, D1, D2, TAIL, STEP, LAST,
            )  # fmt: skip
        else:
            _bwd_keys(
                d_out_ptr, qkv_ptr, lse_ptr, delta_ptr, d_qkv_ptr, first, n, scale,
                CAUSAL, H, D, D1, D2, BLOCK, STEP, LAST,
            )  # fmt: skip
    elif not WHOLE and (cu_ptr is None or n > BLOCK):
        _bwd_blocks(
            d_out_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, d_qkv_ptr, n, scale,
            CAUSAL, H, D, D1, D2, BLOCK, STEP, LAST,
        )  # fmt: skip
    elif (WHOLE or cu_ptr is not None) and n > 0:
        _bwd_whole(d_out_ptr, qkv_ptr, d_qkv_ptr, n, scale, CAUSAL, H, D, D1, D2, BLOCK)
