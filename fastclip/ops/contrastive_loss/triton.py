"""Triton kernels of the contrastive block, for float16, bfloat16 and float32 features of any shape.

Forward, one pass over the logits: program (p, c) owns every P-th block of rows and the c-th part of the columns. A
row's running (max, sum) stays in registers along its columns; a column's is kept per p in global memory, (P, M),
without atomics. Backward: `_d_logits_kernel` writes a chunk of dz (see `chunks`). Both kernels make their products by
`_products`, in the same tiles and order, so that exp(z - lse) meets the same z as the lse.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastclip.ops.contrastive_loss.chunks import Weights, aligned, contiguous, gradients_in_chunks, merge
from fastclip.ops.contrastive_loss.types import Block, Statistics

EMPTY = tl.constexpr(-1e30)  # the maximum of no cosines: finite, so that differences from it are never NaN
LOG2E = tl.constexpr(1.4426950408889634)
SPREAD = tl.constexpr(80.0)  # powers of two within which one exponential serves rows and columns: float32 has 126


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
OPTIONS = ("num_warps", "num_stages")  # of the arguments, those that are none of the kernel
KEPT_BLOCK = (16, 256)


@triton.jit
def _products(
    image, text, start_m, start_n, d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of image @ text^T in fp32, from descriptors: what lies outside the features reads as zero."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_d in range(0, d, BLOCK_D):
        x = image.load([start_m, start_d])
        y = text.load([start_n, start_d])
        acc = tl.dot(x, y.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _power(x, reference, rate):
    """exp(scale (x - reference)), with rate = scale * log2(e): the difference is taken first, where it is exact."""
    return tl.exp2((x - reference) * rate)


@triton.jit
def _fold(x, rate, highest, total, AXIS: tl.constexpr):
    """Running (max of x, sum of exp(scale (x - max))) along AXIS, with x folded in; an empty set is (EMPTY, 0)."""
    top = tl.maximum(highest, tl.max(x, AXIS))
    total = total * _power(highest, top, rate) + tl.sum(_power(x, tl.expand_dims(top, AXIS), rate), AXIS)
    return top, total


@triton.jit
def _fold_both(x, rate, row_max, row_sum, col_max, col_sum):
    """`_fold` along both axes. One exponential serves both where no maximum of a row or column is far below the tile's:
    what float32 cannot hold then is nothing beside its own sum."""
    row_top, col_top = tl.max(x, 1), tl.max(x, 0)
    highest = tl.max(row_top, 0)
    if (highest - tl.minimum(tl.min(row_top, 0), tl.min(col_top, 0))) * rate < SPREAD:
        powers = _power(x, highest, rate)
        row_new, col_new = tl.maximum(row_max, row_top), tl.maximum(col_max, col_top)
        row_sum = row_sum * _power(row_max, row_new, rate) + tl.sum(powers, 1) * _power(highest, row_new, rate)
        col_sum = col_sum * _power(col_max, col_new, rate) + tl.sum(powers, 0) * _power(highest, col_new, rate)
    else:
        row_new, row_sum = _fold(x, rate, row_max, row_sum, 1)
        col_new, col_sum = _fold(x, rate, col_max, col_sum, 0)
    return row_new, row_sum, col_new, col_sum


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
def _is_plain(
    label, start_m, start_n, n, m, row_groups_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Whether all of the tile are negatives, as far as its rows' first and last label tell."""
    is_inside = (start_m + BLOCK_M <= n) & (start_n + BLOCK_N <= m)
    if row_groups_ptr is not None:
        is_inside = False
    return is_inside & ((tl.max(label, 0) < start_n) | (tl.min(label, 0) >= start_n + BLOCK_N))


@triton.jit
def _others(label, row_groups_ptr, col_groups_ptr, offs_m, offs_n, n, m):
    """What is no negative: the row's own, what shares its group, what lies outside."""
    others = (label[:, None] == offs_n[None, :]) | (offs_m >= n)[:, None] | (offs_n >= m)[None, :]
    if row_groups_ptr is not None:
        others |= _same_group(row_groups_ptr, col_groups_ptr, offs_m, offs_n, n, m)
    return others


@triton.jit
def _statistics_kernel(
    image, text, scale_ptr, labels_ptr, row_groups_ptr, col_groups_ptr,
    positive_ptr, row_max_ptr, row_sum_ptr, col_max_ptr, col_sum_ptr, kept_ptr,
    n, m, d, offset, cols_per_part, kept_rows, stride_km,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """row_max, row_sum (C, n) and col_max, col_sum (P, M) of the negatives of each program (p, c), as `_fold` has them;
    positive (n,), a logit.

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
            mask_n = offs_n < m
            col_max = tl.load(col_max_ptr + col_base + offs_n, mask=mask_n, other=EMPTY)
            col_sum = tl.load(col_sum_ptr + col_base + offs_n, mask=mask_n, other=0.0)
            x = _products(image, text, start_m, start_n, d, BLOCK_M, BLOCK_N, BLOCK_D)
            if not _is_plain(label, start_m, start_n, n, m, row_groups_ptr, BLOCK_M, BLOCK_N):
                own = (offs_m < n) & (label >= start_n) & (label < tl.minimum(start_n + BLOCK_N, m))
                positive = tl.sum(tl.where(label[:, None] == offs_n[None, :], x, 0.0), 1)
                tl.store(positive_ptr + offs_m, positive * scale, mask=own)
                others = _others(label, row_groups_ptr, col_groups_ptr, offs_m, offs_n, n, m)
                x = tl.where(others, float("-inf"), x)
            if kept_ptr is not None:  # noqa: SIM102 (known when the kernel is compiled, the other is not)
                if start_m < kept_rows:
                    kept_ptrs = kept_ptr + offs_m.to(tl.int64)[:, None] * stride_km + offs_n[None, :]
                    tl.store(kept_ptrs, x * scale, mask=(offs_m < kept_rows)[:, None] & (offs_n < m)[None, :])
            row_max, row_sum, col_max, col_sum = _fold_both(x, scale * LOG2E, row_max, row_sum, col_max, col_sum)
            tl.store(col_max_ptr + col_base + offs_n, col_max, mask=mask_n)
            tl.store(col_sum_ptr + col_base + offs_n, col_sum, mask=mask_n)
        tl.store(row_max_ptr + row_base + offs_m, row_max, mask=offs_m < n)
        tl.store(row_sum_ptr + row_base + offs_m, row_sum, mask=offs_m < n)
        tl.debug_barrier()  # the next block of rows reads the column sums that other threads of this program stored


@triton.jit
def _d_kept_kernel(
    kept_ptr, row_lse_ptr, col_lse_ptr, d_row_ptr, d_col_ptr, d_logits_ptr,
    n, m, stride_km, stride_dm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz_ij = d_row_i exp(z_ij - row_lse_i) + d_col_j exp(z_ij - col_lse_j) of the negatives that were kept, -inf where
    none is."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < n, offs_n < m
    inside = mask_m[:, None] & mask_n[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    z = tl.load(kept_ptr + rows * stride_km + offs_n[None, :], mask=inside, other=float("-inf"))
    row_lse = tl.load(row_lse_ptr + offs_m, mask=mask_m, other=float("inf"))[:, None]
    col_lse = tl.load(col_lse_ptr + offs_n, mask=mask_n, other=float("inf"))[None, :]
    d_row = tl.load(d_row_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    d_col = tl.load(d_col_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    d_z = d_row * tl.exp(z - row_lse) + d_col * tl.exp(z - col_lse)
    d_ptrs = d_logits_ptr + rows * stride_dm + offs_n[None, :]
    tl.store(d_ptrs, d_z.to(d_logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _d_logits_kernel(
    image, text, scale_ptr, labels_ptr, row_groups_ptr, col_groups_ptr,
    row_lse_ptr, col_lse_ptr, d_row_ptr, d_col_ptr, d_logits,
    n, m, d, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dz of the negatives, zero elsewhere, as `_d_kept_kernel` has it, with lse / scale for the lse."""
    blocks_m, blocks_n = tl.cdiv(n, BLOCK_M), tl.cdiv(m, BLOCK_N)
    pid = tl.program_id(0)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M  # GROUP_M blocks of rows share their columns in the cache
    group = tl.minimum(blocks_m - first_m, GROUP_M)
    within = pid % (GROUP_M * blocks_n)
    start_m, start_n = (first_m + within % group) * BLOCK_M, within // group * BLOCK_N
    rate = tl.load(scale_ptr) * LOG2E
    x = _products(image, text, start_m, start_n, d, BLOCK_M, BLOCK_N, BLOCK_D)

    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < n, offs_n < m
    row_lse = tl.load(row_lse_ptr + offs_m, mask=mask_m, other=float("inf"))
    col_lse = tl.load(col_lse_ptr + offs_n, mask=mask_n, other=float("inf"))
    d_row = tl.load(d_row_ptr + offs_m, mask=mask_m, other=0.0)
    d_col = tl.load(d_col_ptr + offs_n, mask=mask_n, other=0.0)
    highest = tl.maximum(tl.max(row_lse, 0), tl.max(col_lse, 0))
    if (highest - tl.minimum(tl.min(row_lse, 0), tl.min(col_lse, 0))) * rate < SPREAD:  # one exponential for both
        d_row *= _power(highest, row_lse, rate)
        d_col *= _power(highest, col_lse, rate)
        d_z = _power(x, highest, rate) * (d_row[:, None] + d_col[None, :])
    else:
        d_z = d_row[:, None] * _power(x, row_lse[:, None], rate) + d_col[None, :] * _power(x, col_lse[None, :], rate)
    label = _labels(labels_ptr, offs_m, mask_m, offset)
    if not _is_plain(label, start_m, start_n, n, m, row_groups_ptr, BLOCK_M, BLOCK_N):
        d_z = tl.where(_others(label, row_groups_ptr, col_groups_ptr, offs_m, offs_n, n, m), 0.0, d_z)
    d_logits.store([start_m, start_n], d_z.to(d_logits.dtype))


INTERPRETED = not isinstance(_statistics_kernel, triton.JITFunction)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _programs(device: torch.device) -> int:
    """How many programs keep the device busy; a few off the GPU, where the interpreter runs them in turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _descriptors(image: Tensor, text: Tensor, tiles: Tiles) -> tuple[TensorDescriptor, TensorDescriptor]:
    return (
        TensorDescriptor.from_tensor(image, [tiles.block_m, tiles.block_d]),
        TensorDescriptor.from_tensor(text, [tiles.block_n, tiles.block_d]),
    )


def statistics(block: Block) -> Statistics:
    """As `reference.statistics`."""
    image_features, text_features, logit_scale, offset, labels, row_groups, col_groups, kept = block
    image, text = aligned(image_features), aligned(text_features)
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
            *_descriptors(image, text, tiles), logit_scale, *contiguous(labels, row_groups, col_groups),
            positive, row_max, row_sum, col_max, col_sum, kept, n, m, d, offset, cols_per_part,
            *(0, 0) if kept is None else (kept.shape[0], kept.stride(0)), **tiles.arguments(),
        )  # fmt: skip
    return Statistics(positive, *merge(row_max, row_sum, logit_scale), *merge(col_max, col_sum, logit_scale))


def negative_gradients(
    block: Block, row_lse: Tensor, col_lse: Tensor, d_row_lse: Tensor, d_col_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """As `reference.negative_gradients`."""
    return gradients_in_chunks(block, row_lse, col_lse, d_row_lse, d_col_lse, fill_d_logits, fill_from_kept)


def fill_d_logits(d_logits: Tensor, block: Block, weights: Weights) -> None:
    """dz of the block's negatives, zero elsewhere."""
    image, text = block.image_features, block.text_features
    (n, d), m, tiles = image.shape, text.shape[0], TILES[image.dtype]
    grid = (triton.cdiv(n, tiles.block_m) * triton.cdiv(m, tiles.block_n),)
    with _on(image.device):
        _d_logits_kernel[grid](
            *_descriptors(image, text, tiles), block.logit_scale, block.labels, block.row_groups, block.col_groups,
            weights.row_cosine, weights.col_cosine, weights.d_row, weights.d_col,
            TensorDescriptor.from_tensor(d_logits, [tiles.block_m, tiles.block_n]),
            n, m, d, block.offset, **tiles.arguments(), GROUP_M=GROUP_M,
        )  # fmt: skip


def fill_from_kept(d_logits: Tensor, kept: Tensor, weights: tuple[Tensor, ...]) -> None:
    """dz of the negatives whose logits were kept."""
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
        "d_logits": f"tensordesc<{'fp32' if dtype == torch.float32 else 'fp16'}[{tiles.block_m},{tiles.block_n}]>",
    }
    types = {arg: special.get(arg, "*fp32" if arg.endswith("_ptr") else "i32") for arg in kernel.arg_names}
    constants |= tiles.arguments()
    options = {option: constants.pop(option) for option in OPTIONS}
    optional = ("labels_ptr", "row_groups_ptr", "col_groups_ptr", "kept_ptr")
    constants |= {arg: None for arg in optional if arg in kernel.arg_names and arg not in given}
    return {"kernel": kernel, "types": types, "constants": constants, "options": options}
