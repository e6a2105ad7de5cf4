"""The sigmoid block by the CUDA kernel of csrc/cuda/sigmoid_loss.cu, for 16-bit features on Hopper.

The same pass as `triton`'s, with the exponentials of one tile beside the products of the next. Groups are left to
`triton`'s kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.ops import _cuda
from fastclip.ops.contrastive_loss.chunks import CHUNK_COLS, CHUNK_ROWS, HALF_RANGE, aligned
from fastclip.ops.contrastive_loss.cuda import halves
from fastclip.ops.sigmoid_loss import triton
from fastclip.ops.sigmoid_loss.types import Block, Gradients

losses_and_gradients = triton.losses_and_gradients  # of the blocks that it does not take


def takes(block: Block) -> bool:
    """Whether the kernels here do the block."""
    return block.row_groups is None


def losses(block: Block) -> Tensor:
    """As `reference.losses`."""
    if not takes(block):
        return triton.losses(block)
    image, text = aligned(block.image_features), aligned(block.text_features)
    (n, d), m, processors = image.shape, text.shape[0], _cuda.processors(image.device)
    sums = block.logit_scale.new_empty(2 * _cuda.grid(n, m, processors)[1], n, 2)
    tensors = (image, text, block.logit_scale, block.logit_bias, None, sums, None)
    _cuda.launch("fastclip_sigmoid", tensors, (n, m, d, image.dtype == torch.float16, block.offset, 0, processors))
    return sums[..., 0].sum(0)


def gradients(block: Block, weights: Tensor, d_own: Tensor) -> tuple[Gradients, Tensor]:
    """As `reference.losses_and_gradients`, but the gradients have the own pairs' part, d_own_i of each, and are times
    the scale; and the gradient for the scale."""
    image, text = block.image_features.contiguous(), block.text_features.contiguous()
    (n, d), m, scale = image.shape, text.shape[0], block.logit_scale
    is_half, processors = image.dtype == torch.float16, _cuda.processors(image.device)
    wide, (left, right, largest) = (aligned(image), aligned(text)), halves(image, text)
    most = weights.abs().max().clamp_min_(torch.finfo(torch.float32).tiny)
    row_sums = scale.new_empty(processors, min(n, CHUNK_ROWS), 2)  # two warpgroups, at most processors / 2 parts
    scratch = left.new_empty(min(n, CHUNK_ROWS), -(-min(m, CHUNK_COLS) // 8) * 8)
    loss, total, dots = scale.new_empty(3, n)
    grad_image, grad_text = (torch.empty_like(x, dtype=torch.float32) for x in (image, text))
    tensors = (
        image, text, *wide, left, right, scale, block.logit_bias, weights * (HALF_RANGE / most), d_own, most, largest,
        row_sums, scratch, loss, total, grad_image, grad_text, dots,
    )  # fmt: skip
    numbers = (n, m, d, wide[0].shape[1], is_half, block.offset, CHUNK_ROWS, CHUNK_COLS, processors)
    _cuda.launch("fastclip_sigmoid_gradients", tensors, numbers, _cuda.blas())
    return Gradients(loss, total, grad_image, grad_text), dots.sum()
