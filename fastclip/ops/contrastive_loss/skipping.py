"""The plain mean loss with a gradient that leaves out the blocks of logits of next to no weight, by the CPU's kernel.

See csrc/cpu/contrastive_skipping.h for what is left out. The gradient is made with the loss, so that its bound is known
with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.ops import _extension
from fastclip.ops._rows import total
from fastclip.ops.contrastive_loss.op import _exact_lse, scaled_gradients
from fastclip.ops.contrastive_loss.positives import add_positives
from fastclip.ops.contrastive_loss.types import Statistics

CLUSTERS, ROUNDS = 64, 4


class LeftOut(NamedTuple):
    """What an approximate gradient lacks, for the gradients of the mean loss; 0-dim each."""

    image: Tensor  # ||error|| <= this * ||gradient|| in the Frobenius norm
    text: Tensor
    scale: Tensor  # |error| <= this
    early: Tensor  # share of the blocks whose logits were not made again
    late: Tensor  # share of the blocks whose logits were, for nothing


def why_not(image_features: Tensor, impl: str) -> str | None:
    """The reason it cannot run on such features, or None."""
    if impl not in ("auto", "cpu"):
        return f"impl is {impl!r}, must be 'auto' or 'cpu': no other kernel leaves blocks out"
    if image_features.device.type != "cpu":
        return f"image_features is on {image_features.device}, must be on the CPU: no GPU kernel leaves blocks out yet"
    if image_features.dtype not in (torch.float32, torch.bfloat16):
        return f"image_features is {image_features.dtype}, must be float32 or bfloat16"
    return _extension.load()


def similar_first(image_features: Tensor, text_features: Tensor) -> Tensor:
    """An order of the pairs (n,) in which similar ones share a block, so that whole blocks fall away.

    Pairs go to the nearest of some means of image + text, found in a few rounds, and these along their first component;
    about 2 k rounds / n of a product, with k means.
    """
    x = F.normalize((image_features.float() + text_features.float()).nan_to_num(0.0, 0.0, 0.0), dim=1)
    means = x[:: -(-len(x) // CLUSTERS)]
    for _ in range(ROUNDS):
        nearest = (x @ means.T).argmax(1)
        means = F.normalize(torch.zeros_like(means).index_add_(0, nearest, x), dim=1)
    component = torch.linalg.svd(means - means.mean(0), full_matrices=False)[2][0]
    place = (means @ component).argsort().argsort()
    return place[(x @ means.T).argmax(1)].argsort(stable=True)


def mean_and_gradients(
    image: Tensor, text: Tensor, scale: Tensor, tolerance: float, order: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, LeftOut]:
    """(loss, d_image, d_text, d_scale, what they lack) of image and text (n, D) and the scale in fp32."""
    if order is not None:
        image, text = image[order], text[order]
    n, mask = len(image), (0, None, None, None)
    *found, largest = torch.ops.fastclip_cpu.contrastive_loss_statistics_and_largest(image, text, scale, *mask)
    positive, row_max, row_log_sum, col_max, col_log_sum = Statistics(*found)
    x, y = ((highest - positive) + log_sum for highest, log_sum in ((row_max, row_log_sum), (col_max, col_log_sum)))
    loss = total(F.softplus(x, threshold=40.0) + F.softplus(y, threshold=40.0) + 0 * positive) / (2 * n)
    d_row, d_col = x.sigmoid() / (2 * n), y.sigmoid() / (2 * n)
    d_positive = -(d_row + d_col)
    row_lse, d_row = _exact_lse(row_max, row_log_sum, d_row)
    col_lse, d_col = _exact_lse(col_max, col_log_sum, d_col)
    kernel = torch.ops.fastclip_cpu.contrastive_loss_skipping_gradients
    grad_image, grad_text, *lacks, shares = kernel(
        image, text, scale, row_lse, col_lse, d_row, d_col, *mask, largest, tolerance
    )
    add_positives(grad_image, grad_text, d_positive, image, text, 0, None)
    rows, columns = lacks
    left_out = LeftOut(
        image=_relative(rows, text, grad_image),
        text=_relative(columns, image, grad_text),
        scale=rows.sum() * _longest(image) * _longest(text),
        early=shares[0],
        late=shares[1],
    )
    d_image, d_text, d_scale = scaled_gradients(grad_image, grad_text, image.float(), text.float(), scale)
    if order is not None:
        d_image, d_text = (torch.empty_like(d).index_copy_(0, order, d) for d in (d_image, d_text))
    return loss, d_image, d_text, d_scale, left_out


def _relative(lacks: Tensor, other: Tensor, grad: Tensor) -> Tensor:
    """||error|| / ||gradient|| at most, from the sums of |dz| that each row lacks; the exact gradient may be shorter
    than what was made by the error itself."""
    error = torch.linalg.vector_norm(lacks) * _longest(other)
    return error / (torch.linalg.vector_norm(grad) - error).clamp_min(0)


def _longest(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).max()
