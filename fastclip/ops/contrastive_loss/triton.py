"""Triton kernels of the contrastive block, for float16, bfloat16 and float32 features of any shape.

Forward, one pass over the logits: program (p, c) owns every P-th block of rows and the c-th part of the columns. A
row's running (max, sum) stays in registers along its columns; a column's is kept per p in global memory, (P, M),
without atomics. Backward: `_d_logits_kernel` writes a chunk of dz, bounded whatever N is, which two library products
use. Both kernels make their logits by `_logits`, in the same tiles and order, so that exp(z - lse) meets the same z as
the lse.

dz is float16 for bfloat16 features too, with features brought to float16 for the products: bfloat16 would round it
eight times as much, which alone is 1e-3 of the gradient. float16 loses small numbers, so both are brought near 2^15
first and the products are divided again in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastclip.ops.contrastive_loss.dense import product
from fastclip.ops.contrastive_loss.types import Block, Statistics

CHUNK_ROWS, CHUNK_COLS = 8192, 32768  # of dz: 512 MB in 16 bits at most
HALF_RANGE = 2.0**14  # |dz| / max weight is at most 2: 2^15 is below float16's 65504
EMPTY = tl.constexpr(-1e30)  # the maximum of no logits: finite, so that differences from it are never NaN


@dataclass(frozen=True)
class Tiles:
    """Launch configuration: a block of logits, the step along D, and how it is run."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        """As keyword arguments of a kernel."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_D": self.block_d}
        return blocks | {"num_warps": self.num_warps, "num_stages": self.num_stages}


TILES = {  # each compiles for sm_80, sm_90 and sm_100 without a spill
    torch.float16: Tiles(128, 64, 64, num_warps=8, num_stages=3),
    torch.bfloat16: Tiles(128, 64, 64, num_warps=8, num_stages=3),
    torch.float32: Tiles(64, 64, 16, num_warps=8, num_stages=2),  # IEEE products on the CUDA cores
}
KEEPING_TILES = {  # of the forward pass that stores its logits too: what the stores need is taken from the block
    torch.float16: Tiles(64, 64, 64, num_warps=8, num_stages=3),
    torch.bfloat16: Tiles(64, 64, 64, num_warps=8, num_stages=3),
    torch.float32: Tiles(32, 64, 16, num_warps=8, num_stages=2),
}
GROUP_M = 8
KEPT_BLOCK = (16, 256)


@triton.jit
def _logits(
    image, text, scale, start_m, start_n, d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of scale * image @ text^T in fp32, from descriptors: what lies outside the features reads as zero."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_d in range(0, d, BLOCK_D):
        x = image.load([start_m, start_d])
        y = text.load([start_n, start_d])
        acc = tl.dot(x, y.T, acc, input_precision="ieee")
    return acc * scale


@triton.jit
def _fold(z, highest, total, AXIS: tl.constexpr):
    """Running (max, sum of exp(z - max)) along AXIS, with z folded in; an empty set is (EMPTY, 0)."""
    top = tl.maximum(highest, tl.max(z, AXIS))
    total = total * tl.exp(highest - top) + tl.sum(tl.exp(z - tl.expand_dims(top, AXIS)), AXIS)
    return top, total


@triton.jit
def _labels(labels_ptr, offs_m, mask_m, offset):
    """The column of each row's positive: offset beyond its label, or beyond its own number without labels."""
    if labels_ptr is not None:
        offs_m = tl.load(labels_ptr + offs_m, mask=mask_m, other=-1).to(tl.int32)
    return offs_m + offset


@triton.jit
def _same_group(row_groups_ptr, col_groups_ptr, offs_m, offs_n, n, m):
    rows = tl.load(row_groups_ptr + offs_m, mask=offs_m < n, other=0)
    cols = tl.load(col_groups_ptr + offs_n, mask=offs_n < m, other=0)
    return rows[:, None] == cols[None, :]


@triton.jit
def _statistics_kernel(
    image, text, scale_ptr, labels_ptr, row_groups_ptr, col_groups_ptr,
    positive_ptr, row_max_ptr, row_sum_ptr, col_max_ptr, col_sum_ptr, kept_ptr,
    n, m, d, offset, cols_per_part, kept_rows, stride_km,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """row_max, row_sum (C, n) and col_max, col_sum (P, M) of the negatives of each program (p, c); positive (n,).

    col_max and col_sum come in as those of an empty set, EMPTY and 0, positive as NaN. labels_ptr may be None, and
    so may both groups, and kept_ptr: (kept_rows, m) of the negatives.
    """
    pid, part = tl.program_id(0), tl.program_id(1)
    scale = tl.load(scale_ptr)
    first_col, last_col = part * cols_per_part, tl.minimum((part + 1) * cols_per_part, m)
    row_base, col_base = part.to(tl.int64) * n, pid.to(tl.int64) * m
    for start_m in range(pid * BLOCK_M, n, tl.num_programs(0) * BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        label = _labels(labels_ptr, offs_m, offs_m < n, offset)
        row_max = tl.full((BLOCK_M,), EMPTY, tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        for start_n in range(first_col, last_col, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            z = _logits(image, text, scale, start_m, start_n, d, BLOCK_M, BLOCK_N, BLOCK_D)
            is_positive = label[:, None] == offs_n[None, :]
            own = (offs_m < n) & (label >= start_n) & (label < tl.minimum(start_n + BLOCK_N, m))
            if tl.max(own.to(tl.int32), 0) > 0:
                tl.store(positive_ptr + offs_m, tl.sum(tl.where(is_positive, z, 0.0), 1), mask=own)
            outside = (offs_m >= n)[:, None] | (offs_n >= m)[None, :]
            if row_groups_ptr is not None:
                outside |= _same_group(row_groups_ptr, col_groups_ptr, offs_m, offs_n, n, m)
            z = tl.where(is_positive | outside, float("-inf"), z)
            if kept_ptr is not None:  # noqa: SIM102 (known when the kernel is compiled, the other is not)
                if start_m < kept_rows:
                    kept_ptrs = kept_ptr + offs_m.to(tl.int64)[:, None] * stride_km + offs_n[None, :]
                    tl.store(kept_ptrs, z, mask=(offs_m < kept_rows)[:, None] & (offs_n < m)[None, :])
            row_max, row_sum = _fold(z, row_max, row_sum, 1)

            mask_n = offs_n < m
            col_max = tl.load(col_max_ptr + col_base + offs_n, mask=mask_n, other=EMPTY)
            col_sum = tl.load(col_sum_ptr + col_base + offs_n, mask=mask_n, other=0.0)
            col_max, col_sum = _fold(z, col_max, col_sum, 0)
            tl.store(col_max_ptr + col_base + offs_n, col_max, mask=mask_n)
            tl.store(col_sum_ptr + col_base + offs_n, col_sum, mask=mask_n)
        tl.store(row_max_ptr + row_base + offs_m, row_max, mask=offs_m < n)
        tl.store(row_sum_ptr + row_base + offs_m, row_sum, mask=offs_m < n)
        tl.debug_barrier()  # the next block of rows reads the column sums that other threads of this program stored


@triton.jit
def _d_logits(z, row_lse_ptr, col_lse_ptr, d_row_ptr, d_col_ptr, offs_m, offs_n, mask_m, mask_n):
    """dz_ij = d_row_i exp(z_ij - row_lse_i) + d_col_j exp(z_ij - col_lse_j)."""
    row_lse = tl.load(row_lse_ptr + offs_m, mask=mask_m, other=float("inf"))
    col_lse = tl.load(col_lse_ptr + offs_n, mask=mask_n, other=float("inf"))
    d_row = tl.load(d_row_ptr + offs_m, mask=mask_m, other=0.0)
    d_col = tl.load(d_col_ptr + offs_n, mask=mask_n, other=0.0)
    return d_row[:, None] * tl.exp(z - row_lse[:, None]) + d_col[None, :] * tl.exp(z - col_lse[None, :])


@triton.jit
def _d_kept_kernel(
    kept_ptr, row_lse_ptr, col_lse_ptr, d_row_ptr, d_col_ptr, d_logits_ptr,
    n, m, stride_km, stride_dm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz of the negatives that were kept, -inf where none is."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < n, offs_n < m
    inside = mask_m[:, None] & mask_n[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    z = tl.load(kept_ptr + rows * stride_km + offs_n[None, :], mask=inside, other=float("-inf"))
    d_z = _d_logits(z, row_lse_ptr, col_lse_ptr, d_row_ptr, d_col_ptr, offs_m, offs_n, mask_m, mask_n)
    d_ptrs = d_logits_ptr + rows * stride_dm + offs_n[None, :]
    tl.store(d_ptrs, d_z.to(d_logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _d_logits_kernel(
    image, text, scale_ptr, labels_ptr, row_groups_ptr, col_groups_ptr,
    row_lse_ptr, col_lse_ptr, d_row_ptr, d_col_ptr, d_logits_ptr,
    n, m, d, offset, stride_dm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dz of the negatives (`_d_logits`), zero elsewhere."""
    blocks_m, blocks_n = tl.cdiv(n, BLOCK_M), tl.cdiv(m, BLOCK_N)
    pid = tl.program_id(0)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M  # GROUP_M blocks of rows share their columns in the cache
    group = tl.minimum(blocks_m - first_m, GROUP_M)
    within = pid % (GROUP_M * blocks_n)
    start_m, start_n = (first_m + within % group) * BLOCK_M, within // group * BLOCK_N
    z = _logits(image, text, tl.load(scale_ptr), start_m, start_n, d, BLOCK_M, BLOCK_N, BLOCK_D)
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < n, offs_n < m
    d_z = _d_logits(z, row_lse_ptr, col_lse_ptr, d_row_ptr, d_col_ptr, offs_m, offs_n, mask_m, mask_n)
    masked = _labels(labels_ptr, offs_m, mask_m, offset)[:, None] == offs_n[None, :]
    if row_groups_ptr is not None:
        masked |= _same_group(row_groups_ptr, col_groups_ptr, offs_m, offs_n, n, m)
    d_z = tl.where(masked, 0.0, d_z)
    d_ptrs = d_logits_ptr + offs_m.to(tl.int64)[:, None] * stride_dm + offs_n[None, :]
    tl.store(d_ptrs, d_z.to(d_logits_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


INTERPRETED = not isinstance(_statistics_kernel, triton.JITFunction)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _programs(device: torch.device) -> int:
    """How many programs keep the device busy; a few off the GPU, where the interpreter runs them in turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _merge(highest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """(max, log sum) over the parts (K, x) of each row or column."""
    top = highest.amax(0)
    total = (total * (highest - top).exp_()).sum(0)
    return top.masked_fill_(total == 0, -torch.inf), total.log_()


def _descriptors(image: Tensor, text: Tensor, tiles: Tiles) -> tuple[TensorDescriptor, TensorDescriptor]:
    return (
        TensorDescriptor.from_tensor(image, [tiles.block_m, tiles.block_d]),
        TensorDescriptor.from_tensor(text, [tiles.block_n, tiles.block_d]),
    )


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy with its rows padded by zeros, so that rows start at multiples of 16 bytes as descriptors need."""
    step = 16 // x.element_size()
    return F.pad(x, (0, -x.shape[1] % step)).contiguous()


def statistics(block: Block) -> Statistics:
    """As `reference.statistics`."""
    image_features, text_features, logit_scale, offset, labels, row_groups, col_groups, kept = block
    image, text = _aligned(image_features), _aligned(text_features)
    tiles = (TILES if kept is None else KEEPING_TILES)[image.dtype]
    (n, d), m, programs = image.shape, text.shape[0], _programs(image.device)
    rows = min(programs, triton.cdiv(n, tiles.block_m))
    cols_per_part = triton.cdiv(triton.cdiv(m, tiles.block_n), max(1, programs // rows)) * tiles.block_n
    parts = triton.cdiv(m, cols_per_part)
    positive = logit_scale.new_full((n,), torch.nan)
    row_max, row_sum = logit_scale.new_empty(2, parts, n)
    col_max, col_sum = logit_scale.new_full((rows, m), EMPTY.value), logit_scale.new_zeros(rows, m)
    with _on(image.device):
        _statistics_kernel[(rows, parts)](
            *_descriptors(image, text, tiles), logit_scale, *_contiguous(labels, row_groups, col_groups),
            positive, row_max, row_sum, col_max, col_sum, kept, n, m, d, offset, cols_per_part,
            *(0, 0) if kept is None else (kept.shape[0], kept.stride(0)), **tiles.arguments(),
        )  # fmt: skip
    return Statistics(positive, *_merge(row_max, row_sum), *_merge(col_max, col_sum))


def negative_gradients(
    block: Block, row_lse: Tensor, col_lse: Tensor, d_row_lse: Tensor, d_col_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """As `reference.negative_gradients`."""
    image_features, text_features, logit_scale, offset, labels, row_groups, col_groups, kept = block
    n, m = image_features.shape[0], text_features.shape[0]
    unit = torch.maximum(d_row_lse.abs().max(), d_col_lse.abs().max()).clamp_min_(torch.finfo(torch.float32).tiny)
    unit = torch.ones_like(unit) if image_features.dtype == torch.float32 else unit / HALF_RANGE
    d_row, d_col = d_row_lse / unit, d_col_lse / unit
    image, text = _aligned(image_features), _aligned(text_features)
    labels, row_groups, col_groups = _contiguous(labels, row_groups, col_groups)
    grad_image, grad_text = (torch.zeros_like(x, dtype=torch.float32) for x in (image_features, text_features))
    (left, image_unit), (right, text_unit) = _as_half(image_features), _as_half(text_features)
    scratch = left.new_empty(min(n, CHUNK_ROWS), min(m, CHUNK_COLS))
    kept_rows = 0 if kept is None else kept.shape[0]
    for rows in _row_chunks(n, kept_rows):
        i = rows.start
        for j in range(0, m, CHUNK_COLS):
            cols = slice(j, min(j + CHUNK_COLS, m))
            d_logits = scratch[: rows.stop - i, : cols.stop - j]
            weights = (row_lse[rows], col_lse[cols], d_row[rows], d_col[cols])
            if kept is not None and rows.stop <= kept_rows:
                _fill_from_kept(d_logits, kept[rows, cols], weights)
            else:
                mask = (_part(labels, rows), _part(row_groups, rows), _part(col_groups, cols))
                shift = -j if labels is not None else offset + i - j
                _fill_d_logits(d_logits, image[rows], text[cols], logit_scale, mask, weights, shift)
            grad_image[rows] += product(d_logits, right[cols])
            grad_text[cols] += product(d_logits.T, left[rows])
    return grad_image.mul_(unit * text_unit), grad_text.mul_(unit * image_unit)


def _row_chunks(n: int, kept_rows: int) -> Iterator[slice]:
    """Chunks of at most CHUNK_ROWS rows, each of which is kept, or is not."""
    for first, last in ((0, kept_rows), (kept_rows, n)):
        for i in range(first, last, CHUNK_ROWS):
            yield slice(i, min(i + CHUNK_ROWS, last))


def _as_half(x: Tensor) -> tuple[Tensor, Tensor | float]:
    """(y, unit) with x = y * unit: for bfloat16, y in float16 with its largest value between 2^14 and 2^15, whatever it
    was, and exact down to 2^-29 of it; for others x itself."""
    if x.dtype != torch.bfloat16:
        return x, 1.0
    exponent = torch.frexp(x.abs().amax().float()).exponent - 15
    unit = torch.ldexp(torch.ones((), dtype=torch.float32, device=x.device), exponent)
    return (x / unit.to(x.dtype)).to(torch.float16), unit


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _fill_d_logits(
    d_logits: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, mask: tuple[Tensor | None, ...],
    weights: tuple[Tensor, ...], offset: int,
) -> None:  # fmt: skip
    (n, d), m, tiles = image.shape, text.shape[0], TILES[image.dtype]
    grid = (triton.cdiv(n, tiles.block_m) * triton.cdiv(m, tiles.block_n),)
    with _on(image.device):
        _d_logits_kernel[grid](
            *_descriptors(image, text, tiles), logit_scale, *mask, *weights, d_logits,
            n, m, d, offset, d_logits.stride(0), **tiles.arguments(), GROUP_M=GROUP_M,
        )  # fmt: skip


def _fill_from_kept(d_logits: Tensor, kept: Tensor, weights: tuple[Tensor, ...]) -> None:
    n, m = kept.shape
    with _on(kept.device):
        _d_kept_kernel[(triton.cdiv(n, KEPT_BLOCK[0]), triton.cdiv(m, KEPT_BLOCK[1]))](
            kept, *weights, d_logits, n, m, kept.stride(0), d_logits.stride(0), *KEPT_BLOCK
        )  # fmt: skip


def configurations() -> list[dict[str, Any]]:
    """Every kernel in every launch configuration, as `fastclip.testing.compile_offline` takes them."""
    labels, groups = {"labels_ptr": "*i64"}, {"row_groups_ptr": "*i64", "col_groups_ptr": "*i64"}
    kept = {"kept_ptr": "*fp32"}
    cases = []
    for dtype in TILES:
        for given in ({}, labels, labels | groups):
            cases.append(_configuration(_statistics_kernel, dtype, TILES, given))
            cases.append(_configuration(_statistics_kernel, dtype, KEEPING_TILES, given | kept))
            cases.append(_configuration(_d_logits_kernel, dtype, TILES, given, GROUP_M=GROUP_M))
    for kind in ("*fp16", "*fp32"):
        types = {arg: "*fp32" if arg.endswith("_ptr") else "i32" for arg in _d_kept_kernel.arg_names}
        types["d_logits_ptr"] = kind
        constants = dict(zip(("BLOCK_M", "BLOCK_N"), KEPT_BLOCK, strict=True))
        cases.append({"kernel": _d_kept_kernel, "types": types, "constants": constants, "options": {}})
    return cases


def _configuration(
    kernel: Any, dtype: torch.dtype, table: dict[torch.dtype, Tiles], given: dict[str, str], **constants: int | None
) -> dict[str, Any]:
    """given: the types of those pointers that may be None and are not."""
    name, tiles = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype], table[dtype]
    special = given | {
        "image": f"tensordesc<{name}[{tiles.block_m},{tiles.block_d}]>",
        "text": f"tensordesc<{name}[{tiles.block_n},{tiles.block_d}]>",
        "d_logits_ptr": "*fp32" if dtype == torch.float32 else "*fp16",
    }
    types = {arg: special.get(arg, "*fp32" if arg.endswith("_ptr") else "i32") for arg in kernel.arg_names}
    constants |= tiles.arguments()
    options = {option: constants.pop(option) for option in ("num_warps", "num_stages")}
    optional = ("labels_ptr", "row_groups_ptr", "col_groups_ptr", "kept_ptr")
    constants |= {arg: None for arg in optional if arg in kernel.arg_names and arg not in given}
    return {"kernel": kernel, "types": types, "constants": constants, "options": options}
