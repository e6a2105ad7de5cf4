"""What the GPU kernels of the sigmoid block share: the passes in chunks of bounded size, whatever N is.

dz, of a chunk, is used by two library products. It is float16 for bfloat16 features too, as in the contrastive block's
`chunks`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastclip.ops.contrastive_loss.chunks import CHUNK_COLS, CHUNK_ROWS, HALF_RANGE, aligned, as_half, contiguous
from fastclip.ops.contrastive_loss.dense import add_product
from fastclip.ops.sigmoid_loss.types import Block, Gradients

# (block, weights or None, d_logits or None) -> (loss (n,), row sums of dz (n,) or None); fills d_logits with weights_i
# dz_ij
Launch = Callable[[Block, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]


def losses_in_chunks(block: Block, launch: Launch) -> Tensor:
    """As `reference.losses`."""
    whole = _prepared(block)
    n, m = whole.image_features.shape[0], whole.text_features.shape[0]
    loss = whole.logit_scale.new_zeros(n)
    for i in range(0, n, CHUNK_ROWS):
        for j in range(0, m, CHUNK_COLS):
            loss[i : i + CHUNK_ROWS] += launch(_cols_of(_rows_of(whole, i), j), None, None)[0]
    return loss


def gradients_in_chunks(block: Block, weights: Tensor, launch: Launch) -> Gradients:
    """As `reference.losses_and_gradients`."""
    whole, image, text = _prepared(block), block.image_features, block.text_features
    n, m = image.shape[0], text.shape[0]
    unit = weights.abs().max().clamp_min_(torch.finfo(torch.float32).tiny)
    unit = torch.ones_like(unit) if image.dtype == torch.float32 else unit / HALF_RANGE
    weights = weights / unit
    grad_image, grad_text = (torch.zeros_like(x, dtype=torch.float32) for x in (image, text))
    (left, image_unit), (right, text_unit) = as_half(image), as_half(text)
    loss, row_sum = whole.logit_scale.new_zeros(2, n)
    scratch = left.new_empty(min(n, CHUNK_ROWS), -(-min(m, CHUNK_COLS) // 8) * 8)  # rows start as descriptors need it
    for i in range(0, n, CHUNK_ROWS):
        rows = slice(i, min(i + CHUNK_ROWS, n))
        for j in range(0, m, CHUNK_COLS):
            cols = slice(j, min(j + CHUNK_COLS, m))
            d_logits = scratch[: rows.stop - i, : cols.stop - j]
            part_loss, part_sum = launch(_cols_of(_rows_of(whole, i), j), weights[rows], d_logits)
            loss[rows] += part_loss
            row_sum[rows] += part_sum
            add_product(grad_image[rows], d_logits, right[cols])
            add_product(grad_text[cols], d_logits.T, left[rows])
    return Gradients(loss, row_sum, grad_image.mul_(unit * text_unit), grad_text.mul_(unit * image_unit))


def _rows_of(block: Block, start: int) -> Block:
    """The block's rows of one chunk, against all columns."""
    rows = slice(start, start + CHUNK_ROWS)
    groups = None if block.row_groups is None else block.row_groups[rows]
    return block._replace(image_features=block.image_features[rows], row_groups=groups, offset=block.offset + start)


def _cols_of(block: Block, start: int) -> Block:
    cols = slice(start, start + CHUNK_COLS)
    groups = None if block.col_groups is None else block.col_groups[cols]
    return block._replace(text_features=block.text_features[cols], col_groups=groups, offset=block.offset - start)


def _prepared(block: Block) -> Block:
    """Features and groups as the kernel reads them."""
    row_groups, col_groups = contiguous(block.row_groups, block.col_groups)
    return block._replace(
        image_features=aligned(block.image_features),
        text_features=aligned(block.text_features),
        row_groups=row_groups,
        col_groups=col_groups,
    )
