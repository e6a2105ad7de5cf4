"""The whole n x M matrix at once, through the library's matrix product: few launches, for blocks small enough to hold.

16-bit features keep their tensor cores on CUDA with fp32 logits; elsewhere they are widened. Nothing n x M outlives a
call.
"""

from torch import Tensor

from fastclip.ops.contrastive_loss.dense import MAX_ELEMENTS, product
from fastclip.ops.sigmoid_loss.reference import d_logits, signed_logits, softplus
from fastclip.ops.sigmoid_loss.types import Block, Gradients

__all__ = ["MAX_ELEMENTS", "losses", "losses_and_gradients"]


def _signed_logits(block: Block) -> tuple[Tensor, Tensor]:
    logits = product(block.image_features, block.text_features.T).mul_(block.logit_scale).add_(block.logit_bias)
    return signed_logits(logits, block, slice(0, logits.shape[0]))


def losses(block: Block) -> Tensor:
    """As `reference.losses`."""
    x, _ = _signed_logits(block)
    return softplus(x).sum(1)


def losses_and_gradients(block: Block, weights: Tensor) -> Gradients:
    """As `reference.losses_and_gradients`."""
    x, sign = _signed_logits(block)
    dz = d_logits(x, sign)
    loss, row_sum = softplus(x).sum(1), dz.sum(1)
    dz.mul_(weights[:, None])
    grad_image, grad_text = dz @ block.text_features.to(dz.dtype), dz.T @ block.image_features.to(dz.dtype)
    return Gradients(loss, row_sum, grad_image, grad_text)
