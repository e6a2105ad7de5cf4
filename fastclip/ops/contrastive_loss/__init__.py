"""The contrastive block: log-sum-exp of the rows and columns of logit_scale * image @ text^T, and its gradient, in O(N)
memory.

CLIP's loss (Radford et al. 2021, arXiv 2103.00020) over N pairs, z_ij = logit_scale * image_i . text_j:

    loss = 1 / 2N sum_i [ log sum_j exp(z_ij) - z_ii ] + [ log sum_j exp(z_ji) - z_ii ]

is O(N) arithmetic on what `contrastive_block` returns (`fastclip.losses` does it, across ranks too): with a_i and b_i
the log-sum-exp of the negatives of row and column i, loss = 1 / 2N sum_i softplus(a_i - z_ii) + softplus(b_i - z_ii).
The gradient recomputes z tile by tile: four N x N x D products in all, the least without storing an N x N matrix.

The kernels know one positive a row, in any column, and groups to leave out. More positives and label smoothing are
linear in z, so they need sums of features and no kernel (`sums`).
"""

from fastclip.ops.contrastive_loss.implementations import IMPLS, explain, measured
from fastclip.ops.contrastive_loss.op import contrastive_block

__all__ = ["IMPLS", "contrastive_block", "explain", "measured"]
