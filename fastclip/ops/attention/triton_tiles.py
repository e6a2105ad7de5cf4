"""What the Triton kernels of attention share: tiles of one head's rows, and products and masks of them.

Tiles must be powers of two: a head of D dimensions is taken as D1 + D2 of them, so that 72 costs 80 and 88 costs 96; a
tile of rows is a tuple of one or two parts. Offsets below `n` are inside; where `n` is None all are, without a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
    mask = tl.full((1, 1), True, tl.int1)
    if n is not None:
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
def _load_row(ptr, offs_n, n, OTHER: tl.constexpr):
    """One number a row."""
    mask = tl.full((1,), True, tl.int1)
    if n is not None:
        mask = offs_n < n
    return tl.load(ptr + offs_n, mask=mask, other=OTHER)


@triton.jit
def _zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    parts = (tl.zeros((ROWS, D1), tl.float32),)
    if D2 > 0:
        parts = (parts[0], tl.zeros((ROWS, D2), tl.float32))  # type: ignore[assignment]
    return parts


@triton.jit
def _inner(x, y, D2: tl.constexpr, total=None):
    """x y^T over the dimensions of the head, on top of `total`: (X, Y)."""
    total = tl.dot(x[0], y[0].T, total, input_precision="ieee")
    if D2 > 0:
        total = tl.dot(x[1], y[1].T, total, input_precision="ieee")
    return total


@triton.jit
def _row_inner(x, y, D2: tl.constexpr):
    """The inner product of each row of x with that of y."""
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    if D2 > 0:
        total += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), 1)
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
def _hide(scores, value, offs_m, offs_n, n, CAUSAL: tl.constexpr):
    """`value` where a query must not look: behind itself if CAUSAL, and at keys outside."""
    if n is not None:
        scores = tl.where((offs_n < n)[None, :], scores, value)
    if CAUSAL:
        scores = tl.where(offs_n[None, :] > offs_m[:, None], value, scores)
    return scores
