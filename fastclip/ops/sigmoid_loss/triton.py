"""Triton kernel of the sigmoid block, for float16, bfloat16 and float32 features of any shape.

One pass over the logits, in chunks (see `chunks`): a program makes one tile of them, its rows' sums of loss and dz
(kept per block of columns and added afterwards, without atomics), and writes its tile of dz. Without a gradient nothing
but the sums is written. Tiles, and how products are made, are those of the contrastive block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.ops.contrastive_loss.triton import (
    GROUP_M,
    OPTIONS,
    TILES,
    _descriptors,
    _on,
    _products,
    _same_group,
)
from fastclip.ops.sigmoid_loss.chunks import gradients_in_chunks, losses_in_chunks
from fastclip.ops.sigmoid_loss.types import Block, Gradients


@triton.jit
def _softplus_and_sigmoid(x):
    """log(1 + e^x) and 1 / (1 + e^-x), to a few ulp however negative x is, with one exponential and one division.

    With t = e^-|x| and s = t / (2 + t), which is at most 1/3, log(1 + t) = 2 artanh(s): the hardware's logarithm has an
    absolute error that drowns the small losses of nearly all pairs.
    """
    t = tl.exp(-tl.abs(x))
    a, b = t + 1.0, t + 2.0
    inverse = 1.0 / (a * b)
    s = t * a * inverse
    s2 = s * s
    y = s2 * (1 / 15) + 1 / 13
    y = y * s2 + 1 / 11
    y = y * s2 + 1 / 9
    y = y * s2 + 1 / 7
    y = y * s2 + 1 / 5
    y = y * s2 + 1 / 3
    softplus = tl.maximum(x, 0.0) + 2.0 * (s + s * s2 * y)
    return softplus, tl.where(x < 0, t, 1.0) * b * inverse


@triton.jit
def _sigmoid_kernel(
    image, text, scale_ptr, bias_ptr, row_groups_ptr, col_groups_ptr, weights_ptr,
    loss_ptr, row_sum_ptr, d_logits_ptr,
    n, m, d, diagonal, stride_dm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """loss and row_sum (blocks of columns, n), and weights_i dz_ij; column diagonal + i of row i is left out.

    Both groups may be None, and so may weights, row_sum and d_logits together.
    """
    blocks_m, blocks_n = tl.cdiv(n, BLOCK_M), tl.cdiv(m, BLOCK_N)
    pid = tl.program_id(0)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M  # GROUP_M blocks of rows share their columns in the cache
    group = tl.minimum(blocks_m - first_m, GROUP_M)
    within = pid % (GROUP_M * blocks_n)
    block_n = within // group
    start_m, start_n = (first_m + within % group) * BLOCK_M, block_n * BLOCK_N
    x = _products(image, text, start_m, start_n, d, BLOCK_M, BLOCK_N, BLOCK_D) * tl.load(scale_ptr) + tl.load(bias_ptr)
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < n, offs_n < m
    if row_groups_ptr is not None:
        same = _same_group(row_groups_ptr, col_groups_ptr, offs_m, offs_n, n, m)
        x = tl.where(same, -x, x)
    softplus, d_z = _softplus_and_sigmoid(x)
    is_other = ((offs_m + diagonal)[:, None] != offs_n[None, :]) & mask_n[None, :]
    row = block_n.to(tl.int64) * n + offs_m
    tl.store(loss_ptr + row, tl.sum(tl.where(is_other, softplus, 0.0), 1), mask=mask_m)
    if d_logits_ptr is not None:
        if row_groups_ptr is not None:
            d_z = tl.where(same, -d_z, d_z)
        d_z = tl.where(is_other, d_z, 0.0)
        tl.store(row_sum_ptr + row, tl.sum(d_z, 1), mask=mask_m)
        d_z *= tl.load(weights_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        d_ptrs = d_logits_ptr + offs_m.to(tl.int64)[:, None] * stride_dm + offs_n[None, :]
        tl.store(d_ptrs, d_z.to(d_logits_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


INTERPRETED = not isinstance(_sigmoid_kernel, triton.JITFunction)


def launch(block: Block, weights: Tensor | None, d_logits: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As `chunks.Launch`."""
    image, text, tiles = block.image_features, block.text_features, TILES[block.image_features.dtype]
    (n, d), m = image.shape, text.shape[0]
    blocks_n = triton.cdiv(m, tiles.block_n)
    loss = block.logit_scale.new_empty(blocks_n, n)
    row_sum = None if d_logits is None else torch.empty_like(loss)
    with _on(image.device):
        _sigmoid_kernel[(triton.cdiv(n, tiles.block_m) * blocks_n,)](
            *_descriptors(image, text, tiles), block.logit_scale, block.logit_bias, block.row_groups, block.col_groups,
            weights, loss, row_sum, d_logits, n, m, d, block.offset, 0 if d_logits is None else d_logits.stride(0),
            **tiles.arguments(), GROUP_M=GROUP_M,
        )  # fmt: skip
    return loss.sum(0), None if row_sum is None else row_sum.sum(0)


def losses(block: Block) -> Tensor:
    """As `reference.losses`."""
    return losses_in_chunks(block, launch)


def losses_and_gradients(block: Block, weights: Tensor) -> Gradients:
    """As `reference.losses_and_gradients`."""
    return gradients_in_chunks(block, weights, launch)


def configurations() -> list[dict[str, Any]]:
    """The kernel in every launch configuration, as `fastclip.testing.compile_offline` takes them: with and without
    groups, and without a gradient."""
    groups, gradient = ("row_groups_ptr", "col_groups_ptr"), ("weights_ptr", "row_sum_ptr", "d_logits_ptr")
    cases = []
    for dtype, tiles in TILES.items():
        name = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        special = dict.fromkeys(groups, "*i64") | {
            "image": f"tensordesc<{name}[{tiles.block_m},{tiles.block_d}]>",
            "text": f"tensordesc<{name}[{tiles.block_n},{tiles.block_d}]>",
            "d_logits_ptr": "*fp32" if name == "fp32" else "*fp16",
        }
        names = _sigmoid_kernel.arg_names
        types = {arg: special.get(arg, "*fp32" if arg.endswith("_ptr") else "i32") for arg in names}
        absences: tuple[tuple[str, ...], ...] = ((), groups, groups + gradient)
        for absent in absences:
            arguments = tiles.arguments() | {"GROUP_M": GROUP_M}
            options = {option: arguments.pop(option) for option in OPTIONS}
            constants = arguments | dict.fromkeys(absent)
            cases.append({"kernel": _sigmoid_kernel, "types": types, "constants": constants, "options": options})
    return cases
