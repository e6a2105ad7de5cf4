"""The contrastive block by the CUDA kernels of csrc/cuda, for 16-bit features on Hopper.

The same passes as `triton`'s, with the exponentials of one tile beside the products of the next, and what is O(N D)
around them in a launch each. Blocks with groups, and logits kept from the forward to the backward, are left to
`triton`'s kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.ops import _cuda
from fastclip.ops.contrastive_loss import triton
from fastclip.ops.contrastive_loss.chunks import CHUNK_COLS, CHUNK_ROWS, aligned, contiguous
from fastclip.ops.contrastive_loss.positives import add_positives
from fastclip.ops.contrastive_loss.types import Block, Statistics

negative_gradients = triton.negative_gradients  # of the blocks that it does not take


def takes(block: Block) -> bool:
    """Whether the kernels here do the block."""
    return block.row_groups is None and block.kept is None


def statistics(block: Block) -> Statistics:
    """As `reference.statistics`."""
    if not takes(block):
        return triton.statistics(block)
    scale, n, m = block.logit_scale, block.image_features.shape[0], block.text_features.shape[0]
    positive, rows, cols = _statistics(block, scale.new_full((n,), torch.nan))
    row_max, row_log_sum = scale.new_empty(2, n)
    col_max, col_log_sum = scale.new_empty(2, m)
    merged = (row_max, row_log_sum, col_max, col_log_sum)
    _cuda.launch("fastclip_merge", (rows, cols, scale, *merged), (n, m, rows.shape[0], cols.shape[0]))
    return Statistics(positive, *merged)


def _statistics(block: Block, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """positive, filled, and (max, sum) of the parts of rows (K, n, 2) and columns (P, M, 2)."""
    image, text, scale = aligned(block.image_features), aligned(block.text_features), block.logit_scale
    (n, d), m, processors = image.shape, text.shape[0], _cuda.processors(image.device)
    programs, parts = _cuda.grid(n, m, processors)
    rows, cols = scale.new_empty(2 * parts, n, 2), scale.new_empty(programs, m, 2)
    numbers = (n, m, d, image.dtype == torch.float16, block.offset, processors)
    tensors = (image, text, scale, *contiguous(block.labels), positive, rows, cols)
    _cuda.launch("fastclip_statistics", tensors, numbers)
    return positive, rows, cols


def gradients(
    block: Block,
    row_max: Tensor,
    row_log_sum: Tensor,
    d_row_lse: Tensor,
    col_max: Tensor,
    col_log_sum: Tensor,
    d_col_lse: Tensor,
    d_positive: Tensor,
) -> tuple[Tensor, Tensor]:
    """dz @ text (n, D) and dz^T @ image (M, D), the positives' part among them, in fp32."""
    image, text = block.image_features.contiguous(), block.text_features.contiguous()
    (n, d), m, (labels,) = image.shape, text.shape[0], contiguous(block.labels)
    scale, is_half = block.logit_scale, image.dtype == torch.float16
    wide = (aligned(image), aligned(text))
    bounds = torch.zeros(3, dtype=torch.int32, device=image.device)
    row_cosine, col_cosine, d_row, d_col = scale.new_empty(2 * (n + m)).split((n, m, n, m))
    inputs = contiguous(row_max, row_log_sum, d_row_lse, col_max, col_log_sum, d_col_lse)
    _cuda.launch("fastclip_weights", (*inputs, scale, row_cosine, d_row, col_cosine, d_col, bounds), (n, m))
    left, right, largest = halves(image, text)
    scratch = left.new_empty(min(n, CHUNK_ROWS), -(-min(m, CHUNK_COLS) // 8) * 8)
    grad_image, grad_text = (torch.empty_like(x, dtype=torch.float32) for x in (image, text))
    tensors = (
        image, text, *wide, left, right, scale, labels, row_cosine, col_cosine, d_row, d_col, d_positive.contiguous(),
        bounds, largest, scratch, grad_image, grad_text, None, None,
    )  # fmt: skip
    numbers = (n, m, d, wide[0].shape[1], is_half, block.offset, *_chunks(image))
    _cuda.launch("fastclip_gradients", tensors, numbers, _cuda.blas())
    if labels is not None:
        add_positives(grad_image, grad_text, d_positive, image, text, block.offset, labels)
    return grad_image, grad_text


def halves(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both as float16 times a power of two, and what says which: None for float16, as it is."""
    if image.dtype == torch.float16:
        return image, text, None
    left, right = (torch.empty_like(x, dtype=torch.float16) for x in (image, text))
    largest = torch.zeros(2, dtype=torch.int32, device=image.device)
    _cuda.launch("fastclip_as_half", (image, text, largest, left, right), (image.shape[0], *text.shape))
    return left, right, largest


def mean_and_gradients(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean loss over N pairs and its gradients for image, text (N, D) and scale, all in fp32."""
    image, text = image.contiguous(), text.contiguous()
    wide, (n, d), is_half = (aligned(image), aligned(text)), image.shape, image.dtype == torch.float16
    size = _cuda.number("fastclip_contrastive_mean_bytes", (n, d, is_half, *_chunks(image)))
    workspace = torch.empty(size, dtype=torch.uint8, device=image.device)
    loss, dots = scale.new_empty(2, n)
    grad_image, grad_text = scale.new_empty(2, n, d)
    tensors = (image, text, *wide, scale, loss, grad_image, grad_text, dots, workspace)
    numbers = (n, d, wide[0].shape[1], is_half, *_chunks(image))
    _cuda.launch("fastclip_contrastive_mean", tensors, numbers, _cuda.blas())
    return loss.mean(), grad_image, grad_text, dots.sum()


def _chunks(image: Tensor) -> tuple[int, int, int]:
    """Rows and columns of a chunk of dz, and the multiprocessors that fill it."""
    return CHUNK_ROWS, CHUNK_COLS, _cuda.processors(image.device)
