"""A loss whose gradient the compiled kernel makes with it, in one call: what small batches on the CPU are best at.

A small batch is made of overheads, so here they are those of one call. All logits are held within it, and making the
gradient in advance takes three products, as may be done where the incoming gradient is one number.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: str, *inputs: Tensor) -> Tensor:
        loss, *grads = getattr(torch.ops.fastclip_cpu, kernel)(*inputs[:2], *(x.to(torch.float32) for x in inputs[2:]))
        ctx.save_for_backward(*grads)
        ctx.dtypes = [x.dtype for x in inputs]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return None, *((x * d_loss).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))


def mean_at_once(kernel: str, image_features: Tensor, text_features: Tensor, *scalars: Tensor) -> Tensor:
    """The mean loss over N pairs of the CPU's kernel `kernel`, in fp32.

    fp32 or bf16 features (N, D) on the CPU, with the extension there; scalars 0-dim: the exponentiated scale, and the
    bias where the loss has one. Holds N x N logits during the call, and the gradients in fp32 until backward.
    Differentiable once.
    """
    return _AtOnce.apply(kernel, image_features, text_features, *scalars)
