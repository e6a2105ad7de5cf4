"""The sigmoid block: SigLIP's pairwise loss of logit_scale * image @ text^T + logit_bias, and its gradient, in O(N)
memory.

SigLIP's loss (Zhai et al. 2023, arXiv 2303.15343) of n images and M texts, z_ij = logit_scale * image_i . text_j +
logit_bias, y_ij = +1 for the text that belongs to image i and -1 for the others:

    loss_i = sum_j softplus(-y_ij z_ij)        dz_ij = -y_ij sigmoid(-y_ij z_ij)

Every pair stands alone, so a chunk of logits gives its part of the gradient at once: loss and gradient together cost
three n x M x D products, where the softmax family, which must know its sums first, needs four.
"""

from fastclip.ops.sigmoid_loss.implementations import IMPLS, explain, measured
from fastclip.ops.sigmoid_loss.op import sigmoid_rows, sigmoid_sum

__all__ = ["IMPLS", "explain", "measured", "sigmoid_rows", "sigmoid_sum"]
