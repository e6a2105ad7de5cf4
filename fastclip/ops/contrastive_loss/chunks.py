"""What the GPU kernels of the contrastive block share: the merged statistics, and the backward in chunks.

dz, in chunks of bounded size whatever N is, is used by two library products. It is float16 for bfloat16 features too,
with features brought to float16 for the products: bfloat16 would round it eight times as much, which alone is 1e-3 of
the gradient. float16 loses small numbers, so both are brought near 2^15 first and the products are divided again in
fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.ops.contrastive_loss.dense import add_product
from fastclip.ops.contrastive_loss.types import Block

CHUNK_ROWS, CHUNK_COLS = 8192, 32768  # of dz: 512 MB in 16 bits at most
HALF_RANGE = 2.0**14  # |dz| / max weight is at most 2: 2^15 is below float16's 65504


class Weights(NamedTuple):
    """dz_ij = d_row_i exp(scale (x_ij - row_cosine_i)) + d_col_j exp(scale (x_ij - col_cosine_j)), x the cosines."""

    row_cosine: Tensor  # lse / scale
    col_cosine: Tensor
    d_row: Tensor
    d_col: Tensor


def merge(highest: Tensor, total: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(max, log sum) of the logits over the parts (K, x) of each row or column, of (max, sum) as `_fold` has them."""
    top = highest.amax(0)
    total = (total * (highest - top).mul_(logit_scale).exp_()).sum(0)
    maximum = (top * logit_scale).masked_fill_(total == 0, -torch.inf)
    lost = top.double() * logit_scale - maximum  # by its rounding
    return maximum, torch.where(total == 0, total.log(), total.log() + lost).float()


def aligned(x: Tensor) -> Tensor:
    """x, or a copy with its rows padded by zeros, so that rows start at multiples of 16 bytes as descriptors need."""
    padding = -x.shape[1] % (16 // x.element_size())
    x = F.pad(x, (0, padding)) if padding else x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def gradients_in_chunks(
    block: Block,
    row_lse: Tensor,
    col_lse: Tensor,
    d_row_lse: Tensor,
    d_col_lse: Tensor,
    fill_d_logits: Callable[[Tensor, Block, Weights], None],
    fill_from_kept: Callable[[Tensor, Tensor, tuple[Tensor, ...]], None],
) -> tuple[Tensor, Tensor]:
    """As `reference.negative_gradients`.

    Args:
        fill_d_logits: (d_logits, part of the block, its weights): writes dz of the part.
        fill_from_kept: (d_logits, kept, (row_lse, col_lse, d_row, d_col)): the same where the logits were kept.
    """
    image_features, text_features, kept = block.image_features, block.text_features, block.kept
    n, m = image_features.shape[0], text_features.shape[0]
    unit = torch.maximum(d_row_lse.abs().max(), d_col_lse.abs().max()).clamp_min_(torch.finfo(torch.float32).tiny)
    unit = torch.ones_like(unit) if image_features.dtype == torch.float32 else unit / HALF_RANGE
    d_row, d_col = d_row_lse / unit, d_col_lse / unit
    labels, row_groups, col_groups = contiguous(block.labels, block.row_groups, block.col_groups)
    whole = block._replace(
        image_features=aligned(image_features), text_features=aligned(text_features),
        labels=labels, row_groups=row_groups, col_groups=col_groups,
    )  # fmt: skip
    grad_image, grad_text = (torch.zeros_like(x, dtype=torch.float32) for x in (image_features, text_features))
    (left, image_unit), (right, text_unit) = as_half(image_features), as_half(text_features)
    scratch = left.new_empty(min(n, CHUNK_ROWS), -(-min(m, CHUNK_COLS) // 8) * 8)  # rows start as descriptors need it
    weights = _weights(row_lse, col_lse, d_row, d_col, block.logit_scale)
    kept_rows = 0 if kept is None else kept.shape[0]
    for rows in _row_chunks(n, kept_rows):
        for j in range(0, m, CHUNK_COLS):
            cols = slice(j, min(j + CHUNK_COLS, m))
            d_logits = scratch[: rows.stop - rows.start, : cols.stop - j]
            if kept is not None and rows.stop <= kept_rows:
                fill_from_kept(d_logits, kept[rows, cols], (row_lse[rows], col_lse[cols], d_row[rows], d_col[cols]))
            else:
                fill_d_logits(d_logits, _part_of(whole, rows, cols), _weights_of(weights, rows, cols))
            add_product(grad_image[rows], d_logits, right[cols])
            add_product(grad_text[cols], d_logits.T, left[rows])
    return grad_image.mul_(unit * text_unit), grad_text.mul_(unit * image_unit)


def _part_of(block: Block, rows: slice, cols: slice) -> Block:
    shift = -cols.start if block.labels is not None else block.offset + rows.start - cols.start
    return block._replace(
        image_features=block.image_features[rows], text_features=block.text_features[cols], offset=shift,
        labels=_of(block.labels, rows), row_groups=_of(block.row_groups, rows), col_groups=_of(block.col_groups, cols),
    )  # fmt: skip


def _weights(row_lse: Tensor, col_lse: Tensor, d_row: Tensor, d_col: Tensor, logit_scale: Tensor) -> Weights:
    row_cosine, row_weight = _over_scale(row_lse, d_row, logit_scale)
    col_cosine, col_weight = _over_scale(col_lse, d_col, logit_scale)
    return Weights(row_cosine, col_cosine, row_weight, col_weight)


def _weights_of(weights: Weights, rows: slice, cols: slice) -> Weights:
    return Weights(weights.row_cosine[rows], weights.col_cosine[cols], weights.d_row[rows], weights.d_col[cols])


def _over_scale(lse: Tensor, d_lse: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(y, d) with d exp(scale (x - y)) = d_lse exp(scale x - lse): what rounding y changes, 6e-6 near 100, is in d."""
    over_scale = lse / logit_scale
    lost = over_scale.double() * logit_scale - lse
    return over_scale, d_lse * torch.where(lse.isinf(), 1.0, lost.exp()).float()


def _row_chunks(n: int, kept_rows: int) -> Iterator[slice]:
    """Chunks of at most CHUNK_ROWS rows, each of which is kept, or is not."""
    for first, last in ((0, kept_rows), (kept_rows, n)):
        for i in range(first, last, CHUNK_ROWS):
            yield slice(i, min(i + CHUNK_ROWS, last))


def as_half(x: Tensor) -> tuple[Tensor, Tensor | float]:
    """(y, unit) with x = y * unit: for bfloat16, y in float16 with its largest value between 2^14 and 2^15, whatever it
    was, and exact down to 2^-29 of it; for others x itself."""
    if x.dtype != torch.bfloat16:
        return x, 1.0
    exponent = torch.frexp(x.abs().amax().float()).exponent - 15
    unit = torch.ldexp(torch.ones((), dtype=torch.float32, device=x.device), exponent)
    return (x / unit.to(x.dtype)).to(torch.float16), unit


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _of(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]
