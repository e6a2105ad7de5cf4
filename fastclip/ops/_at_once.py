"""A loss whose gradient the compiled kernels make with it, in one call: what small batches are best at.

A small batch is made of overheads, so here they are those of one call. The gradient is made in advance, as may be done
where the incoming gradient is one number.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Tensor:
        loss, *grads = kernel(*inputs[:2], *(x.to(torch.float32) for x in inputs[2:]))
        ctx.save_for_backward(*grads)
        ctx.dtypes = [x.dtype for x in inputs]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return None, *((x * d_loss).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))


def mean_at_once(
    kernel: Callable[..., tuple[Tensor, ...]], image_features: Tensor, text_features: Tensor, *scalars: Tensor
) -> Tensor:
    """The mean loss over N pairs, in fp32.

    kernel: given features (N, D) and the scalars in fp32, the loss and the gradient for each in fp32.
    scalars: 0-dim: the exponentiated scale, and the bias where the loss has one.

    The gradients are held in fp32 until backward. Differentiable once.
    """
    return _AtOnce.apply(kernel, image_features, text_features, *scalars)
