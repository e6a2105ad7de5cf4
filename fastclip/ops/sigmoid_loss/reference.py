"""The specification of the sigmoid block: plain PyTorch on any device, exact in fp64, O(N) memory by chunks of rows.

Of row i an implementation sums the pairs with all texts but its own, which is column offset + i:

    loss_i = sum_{j != offset + i} softplus(x_ij)    dz_ij = -y_ij sigmoid(x_ij)    x_ij = -y_ij z_ij

with y_ij = +1 where row and column are of one group and -1 elsewhere. softplus and sigmoid keep their relative accuracy
however negative x is, so that a converged batch stays exact. The own pairs are O(N D) and added by `op` in full
precision: a few of them weigh as much in the gradient as all others together.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.ops.contrastive_loss.reference import accumulation_dtype
from fastclip.ops.sigmoid_loss.types import Block, Gradients

CHUNK_ELEMENTS = 1 << 22  # logits held at once: 16 MB in fp32
_EXACT_SOFTPLUS = 40.0  # beyond, softplus(x) - x < 5e-18: x itself, in fp64 too


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), to the last digits in fp64 too."""
    return F.softplus(x, threshold=_EXACT_SOFTPLUS)


def signed_logits(logits: Tensor, block: Block, rows: slice) -> tuple[Tensor, Tensor]:
    """(x, sign) of z (rows, M): x_ij = -y_ij z_ij, but -inf for the own pair; sign is -y_ij."""
    sign = torch.ones_like(logits)
    if block.row_groups is not None and block.col_groups is not None:
        sign.masked_fill_(block.row_groups[rows, None] == block.col_groups, -1)
    x = logits * sign
    x.diagonal(block.offset + rows.start).fill_(-torch.inf)
    return x, sign


def d_logits(x: Tensor, sign: Tensor) -> Tensor:
    """dz (rows, M) of `signed_logits`: sign * sigmoid(x), so zero for the own pair."""
    return x.sigmoid().mul_(sign)


def _chunks(block: Block) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(rows, image (rows, D), x, sign), chunk by chunk."""
    dtype = accumulation_dtype(block.image_features.dtype)
    n, text = block.image_features.shape[0], block.text_features.to(dtype)
    step = max(1, CHUNK_ELEMENTS // text.shape[0])
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        image = block.image_features[rows].to(dtype)
        logits = (image @ text.T).mul_(block.logit_scale).add_(block.logit_bias)
        yield rows, image, *signed_logits(logits, block, rows)


def losses(block: Block) -> Tensor:
    """(n,) sums over the other pairs of each row."""
    loss = block.logit_scale.new_empty(block.image_features.shape[0])
    for rows, _, x, _ in _chunks(block):
        loss[rows] = softplus(x).sum(1)
    return loss


def losses_and_gradients(block: Block, weights: Tensor) -> Gradients:
    """`losses` with the gradients of sum_i weights_i loss_i; weights (n,) in the accumulation dtype."""
    text = block.text_features.to(accumulation_dtype(block.text_features.dtype))
    grad_image, grad_text = text.new_empty(block.image_features.shape), torch.zeros_like(text)
    loss, row_sum = (text.new_empty(weights.shape) for _ in range(2))
    for rows, image, x, sign in _chunks(block):
        dz = d_logits(x, sign)
        loss[rows], row_sum[rows] = softplus(x).sum(1), dz.sum(1)
        dz.mul_(weights[rows, None])
        grad_image[rows] = dz @ text
        grad_text.addmm_(dz.T, image)
    return Gradients(loss, row_sum, grad_image, grad_text)
