"""Registration: `fastclip::contrastive_loss_fwd` and `_bwd`, one rank's block, with one autograd.Function outside.

An implementation supplies two functions, `statistics` and `negative_gradients` (see `reference`); what is O(N D), the
positives' and the scale's gradient and the casts, is shared here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastclip.ops.contrastive_loss.implementations import implementation
from fastclip.ops.contrastive_loss.reference import accumulation_dtype

_library = torch.library.Library("fastclip", "FRAGMENT")
_library.define(
    "contrastive_loss_fwd(Tensor image_features, Tensor text_features, Tensor logit_scale, SymInt offset, str impl)"
    " -> (Tensor positive, Tensor row_max, Tensor row_log_sum, Tensor col_max, Tensor col_log_sum)"
)
_library.define(
    "contrastive_loss_bwd(Tensor d_positive, Tensor d_row_lse, Tensor d_col_lse,"
    " Tensor image_features, Tensor text_features, Tensor logit_scale,"
    " Tensor row_max, Tensor row_log_sum, Tensor col_max, Tensor col_log_sum, SymInt offset, str impl)"
    " -> (Tensor d_image_features, Tensor d_text_features, Tensor d_logit_scale)"
)


def _fwd(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, offset: int, impl: str
) -> tuple[Tensor, ...]:
    with torch.autocast(image_features.device.type, enabled=False):
        kernels = implementation(impl, image_features, text_features)
        dtype = accumulation_dtype(image_features.dtype)
        return tuple(kernels.statistics(image_features, text_features, logit_scale.to(dtype), offset))


def _lse(highest: Tensor, log_sum: Tensor) -> Tensor:
    lse = highest + log_sum
    return lse.masked_fill_(lse == -torch.inf, torch.inf)  # no negatives: exp(z - lse) is 0


def _bwd(
    d_positive: Tensor,
    d_row_lse: Tensor,
    d_col_lse: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    row_max: Tensor,
    row_log_sum: Tensor,
    col_max: Tensor,
    col_log_sum: Tensor,
    offset: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(image_features.device.type, enabled=False):
        kernels = implementation(impl, image_features, text_features)
        dtype = accumulation_dtype(image_features.dtype)
        scale, own = logit_scale.to(dtype), slice(offset, offset + image_features.shape[0])
        image, own_text = image_features.to(dtype), text_features[own].to(dtype)
        row_lse, col_lse = _lse(row_max, row_log_sum), _lse(col_max, col_log_sum)
        grad_image, grad_text = kernels.negative_gradients(
            image_features, text_features, scale, row_lse, col_lse, d_row_lse, d_col_lse, offset
        )
        grad_image.addcmul_(d_positive[:, None], own_text)
        grad_text[own].addcmul_(d_positive[:, None], image)
        d_logit_scale = (image * grad_image).sum()  # sum_ij dz_ij cos_ij, without another pass over the matrix
        d_image_features = grad_image.mul_(scale).to(image_features.dtype)
        d_text_features = grad_text.mul_(scale).to(text_features.dtype)
        return d_image_features, d_text_features, d_logit_scale.to(logit_scale.dtype)


def _fwd_fake(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, offset: int, impl: str
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(image_features.dtype)
    n, m = image_features.shape[0], text_features.shape[0]
    positive, row_max, row_log_sum = (image_features.new_empty(n, dtype=dtype) for _ in range(3))
    col_max, col_log_sum = (image_features.new_empty(m, dtype=dtype) for _ in range(2))
    return positive, row_max, row_log_sum, col_max, col_log_sum


def _bwd_fake(
    d_positive: Tensor,
    d_row_lse: Tensor,
    d_col_lse: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    row_max: Tensor,
    row_log_sum: Tensor,
    col_max: Tensor,
    col_log_sum: Tensor,
    offset: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    features = (image_features, text_features)
    d_image_features, d_text_features = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in features)
    return d_image_features, d_text_features, torch.empty_like(logit_scale)


for _key in ("CPU", "CUDA"):
    _library.impl("contrastive_loss_fwd", _fwd, _key)
    _library.impl("contrastive_loss_bwd", _bwd, _key)
torch.library.register_fake("fastclip::contrastive_loss_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("fastclip::contrastive_loss_bwd", _bwd_fake, lib=_library)


class _ContrastiveBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, offset: int, impl: str
    ) -> tuple[Tensor, ...]:
        outputs = torch.ops.fastclip.contrastive_loss_fwd(image_features, text_features, logit_scale, offset, impl)
        _, row_max, row_log_sum, col_max, col_log_sum = outputs
        ctx.save_for_backward(image_features, text_features, logit_scale, row_max, row_log_sum, col_max, col_log_sum)
        ctx.mark_non_differentiable(row_max, col_max)
        ctx.offset, ctx.impl = offset, impl
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_positive, _, d_row_lse, _, d_col_lse = d_outputs
        grads = torch.ops.fastclip.contrastive_loss_bwd(
            d_positive, d_row_lse, d_col_lse, *ctx.saved_tensors, ctx.offset, ctx.impl
        )
        return *grads, None, None


def contrastive_block(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, offset: int = 0, impl: str = "auto"
) -> tuple[Tensor, ...]:
    """One rank's block of the logits z = logit_scale * image @ text^T, without ever holding it.

    Args:
        image_features: (n, D).
        text_features: (M, D), same dtype and device; the positive of row i is column offset + i.
        logit_scale: 0-dim, exponentiated.
        offset: 0 <= offset <= M - n.
        impl: "auto", "reference", "dense", "cpu" or "triton".

    Returns:
        positive (n,), and of the negatives row_max (n,), row_log_sum (n,), col_max (M,), col_log_sum (M,), in fp32
        (fp64 for fp64 input): their log-sum-exp is max + log_sum, -inf where there are none. The maxima are constants
        to autograd: the gradient of the log-sum-exp is that of log_sum. Differentiable once; O(n + M) is kept beside
        the inputs.
    """
    return _ContrastiveBlock.apply(image_features, text_features, logit_scale, offset, impl)
