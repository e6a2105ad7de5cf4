"""Registration: `fastclip::sigmoid_loss_fwd` and `sigmoid_loss_fwd_bwd`, one rank's block, with the autograd.Functions
outside.

An implementation supplies two functions, `losses` and `losses_and_gradients` (see `reference`), for all pairs but a
row's own; what is O(N D), the own pairs and the gradients of scale and bias, is shared here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastclip.ops._rows import add_scaled, dots, inner_product, scaled, total
from fastclip.ops.contrastive_loss.reference import accumulation_dtype
from fastclip.ops.sigmoid_loss.implementations import implementation
from fastclip.ops.sigmoid_loss.reference import softplus
from fastclip.ops.sigmoid_loss.types import Block

_library = torch.library.Library("fastclip", "FRAGMENT")
_BLOCK = (
    "Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor logit_bias,"
    " Tensor? row_groups, Tensor? col_groups, SymInt offset"
)
_library.define(f"sigmoid_loss_fwd({_BLOCK}, str impl) -> Tensor")
_library.define(
    f"sigmoid_loss_fwd_bwd({_BLOCK}, Tensor weights, str impl)"
    " -> (Tensor loss, Tensor d_image_features, Tensor d_text_features, Tensor d_logit_scale, Tensor d_logit_bias)"
)


def _block(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    row_groups: Tensor | None,
    col_groups: Tensor | None,
    offset: int,
) -> tuple[Block, Tensor, Tensor]:
    """(block, own text (n, D), logits of the own pairs (n,) in the accumulation dtype)."""
    dtype = accumulation_dtype(image_features.dtype)
    scale, bias = logit_scale.to(dtype), logit_bias.to(dtype)
    own_text = text_features[offset : offset + image_features.shape[0]]
    block = Block(image_features, text_features, scale, bias, row_groups, col_groups, offset)
    return block, own_text, dots(image_features, own_text, dtype).mul_(scale).add_(bias)


def _fwd(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    row_groups: Tensor | None,
    col_groups: Tensor | None,
    offset: int,
    impl: str,
) -> Tensor:
    with torch.autocast(image_features.device.type, enabled=False):
        kernels = implementation(impl, image_features, text_features)
        block, _, own = _block(image_features, text_features, logit_scale, logit_bias, row_groups, col_groups, offset)
        return kernels.losses(block).add_(softplus(-own))


def _fwd_bwd(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    row_groups: Tensor | None,
    col_groups: Tensor | None,
    offset: int,
    weights: Tensor,
    impl: str,
) -> tuple[Tensor, ...]:
    with torch.autocast(image_features.device.type, enabled=False):
        kernels = implementation(impl, image_features, text_features)
        block, own_text, own = _block(
            image_features, text_features, logit_scale, logit_bias, row_groups, col_groups, offset
        )
        d_own = -weights * (-own).sigmoid()  # softplus'(-z) by z, weighted
        if hasattr(kernels, "gradients") and kernels.takes(block):
            others, d_logit_scale = kernels.gradients(block, weights, d_own)
            d_logit_bias = total(weights * others.d_logits + d_own)
            loss = others.loss.add_(softplus(-own))
            return loss, others.grad_image, others.grad_text, d_logit_scale, d_logit_bias
        others = kernels.losses_and_gradients(block, weights)
        grad_image, grad_text = others.grad_image, others.grad_text
        add_scaled(grad_image, d_own, own_text)
        add_scaled(grad_text[offset : offset + image_features.shape[0]], d_own, image_features)
        loss = others.loss.add_(softplus(-own))
        d_logit_scale = inner_product(image_features, grad_image)  # sum_ij dz_ij cos_ij, without a pass over the matrix
        d_logit_bias = total(weights * others.d_logits + d_own)
        return loss, grad_image.mul_(block.logit_scale), grad_text.mul_(block.logit_scale), d_logit_scale, d_logit_bias


def _fwd_fake(image_features: Tensor, *_: Any) -> Tensor:
    return image_features.new_empty(image_features.shape[0], dtype=accumulation_dtype(image_features.dtype))


def _fwd_bwd_fake(image_features: Tensor, text_features: Tensor, *_: Any) -> tuple[Tensor, ...]:
    loss = _fwd_fake(image_features)
    return loss, *(loss.new_empty(shape) for shape in (image_features.shape, text_features.shape, (), ()))


for _key in ("CPU", "CUDA"):
    _library.impl("sigmoid_loss_fwd", _fwd, _key)
    _library.impl("sigmoid_loss_fwd_bwd", _fwd_bwd, _key)
torch.library.register_fake("fastclip::sigmoid_loss_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("fastclip::sigmoid_loss_fwd_bwd", _fwd_bwd_fake, lib=_library)


class _SigmoidSum(torch.autograd.Function):
    """sum_i weights_i loss_i. The gradients are made with the loss and kept in fp32 until the incoming one is known."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        loss, *grads = torch.ops.fastclip.sigmoid_loss_fwd_bwd(*inputs)
        ctx.save_for_backward(*grads, loss)
        ctx.dtypes = [x.dtype for x in inputs[:4]]
        return total(inputs[7] * loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor | None, ...]:
        *grads, loss = ctx.saved_tensors
        d_inputs = (scaled(grad, d_sum, dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
        return *d_inputs, None, None, None, loss * d_sum, None


class _SigmoidRows(torch.autograd.Function):
    """loss (n,). A gradient for each row comes in, so backward makes the logits again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, offset, impl = inputs
        ctx.save_for_backward(*tensors)
        ctx.offset, ctx.impl = offset, impl
        return torch.ops.fastclip.sigmoid_loss_fwd(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        _, *grads = torch.ops.fastclip.sigmoid_loss_fwd_bwd(*tensors, ctx.offset, d_loss, ctx.impl)
        d_inputs = (grad.to(x.dtype) for grad, x in zip(grads, tensors[:4], strict=True))
        return *d_inputs, None, None, None, None


def sigmoid_rows(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    row_groups: Tensor | None = None,
    col_groups: Tensor | None = None,
    offset: int = 0,
    impl: str = "auto",
) -> Tensor:
    """One rank's rows of the sigmoid loss, without ever holding the matrix of logits.

    Args:
        image_features: (n, D).
        text_features: (M, D), same dtype and device; the own text of row i is column offset + i.
        logit_scale, logit_bias: 0-dim; the scale exponentiated.
        row_groups, col_groups: (n,) and (M,) int64: pairs of one group are positives too. Both or neither.
        offset: 0 <= offset <= M - n.
        impl: "auto", "reference", "dense", "cpu", "triton" or "cuda".

    Returns:
        (n,) sum_j softplus(-y_ij z_ij) in fp32 (fp64 for fp64 input). Differentiable once, at the price of making
        the logits again: four products in all. Nothing beside the inputs is kept.
    """
    return _SigmoidRows.apply(
        image_features, text_features, logit_scale, logit_bias, row_groups, col_groups, offset, impl
    )


def sigmoid_sum(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    row_groups: Tensor | None,
    col_groups: Tensor | None,
    offset: int,
    weights: Tensor,
    impl: str = "auto",
) -> Tensor:
    """sum_i weights_i loss_i of `sigmoid_rows`, weights (n,) in the accumulation dtype.

    Where a gradient is needed it is made in the same pass, three products in all, and kept in the accumulation dtype,
    (n + M) D values, until backward. To a second differentiation it is a constant.
    """
    arguments = (image_features, text_features, logit_scale, logit_bias, row_groups, col_groups, offset)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*arguments[:4], weights)):
        return _SigmoidSum.apply(*arguments, weights, impl)
    return total(weights * torch.ops.fastclip.sigmoid_loss_fwd(*arguments, impl))
