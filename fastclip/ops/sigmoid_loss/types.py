"""What an implementation of the sigmoid block is given and returns."""

from typing import NamedTuple

from torch import Tensor


class Block(NamedTuple):
    """One rank's rows against all columns; the scale and the bias are 0-dim in the accumulation dtype."""

    image_features: Tensor  # (n, D)
    text_features: Tensor  # (M, D)
    logit_scale: Tensor
    logit_bias: Tensor
    row_groups: Tensor | None  # (n,) int64, or None: only a row's own text is positive
    col_groups: Tensor | None  # (M,) int64, None with row_groups
    offset: int  # the own text of row i is column offset + i


class Gradients(NamedTuple):
    """The loss of the other pairs and its gradient, with dz_ij = d loss_i / dz_ij; fp32, or fp64 for fp64 input."""

    loss: Tensor  # (n,)
    d_logits: Tensor  # (n,) sum_j dz_ij
    grad_image: Tensor  # (n, D) sum_j weights_i dz_ij text_j, not yet multiplied by the scale
    grad_text: Tensor  # (M, D) sum_i weights_i dz_ij image_i
