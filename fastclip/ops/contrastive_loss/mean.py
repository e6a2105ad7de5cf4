"""The plain loss of a small batch on the CPU, gradient and all in one call of the compiled kernel.

A small batch is made of overheads, so here they are those of one call. All logits are held within it and the gradient
is made with the loss, three products, as may be done where the incoming gradient is one number.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        kernel = torch.ops.fastclip_cpu.contrastive_loss_mean
        loss, *grads = kernel(image_features, text_features, logit_scale.to(torch.float32))
        ctx.save_for_backward(*grads)
        ctx.dtypes = (image_features.dtype, text_features.dtype, logit_scale.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, ...]:
        return tuple((grad * d_loss).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))


def contrastive_mean(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The mean loss (Radford et al. 2021) of image_features and text_features (N, D), text i of image i, in fp32.

    fp32 or bf16 features on the CPU, with the extension there; logit_scale 0-dim and exponentiated. Holds N x N logits
    during the call, and the gradients in fp32 until backward. Differentiable once.
    """
    return _Mean.apply(image_features, text_features, logit_scale)
