"""Registration: `fastclip::contrastive_loss_fwd` and `_bwd`, one rank's block, with one autograd.Function outside;
`fastclip::contrastive_sums_fwd` and `_bwd`, the sums over groups that go with it.

An implementation supplies two functions, `statistics` and `negative_gradients` (see `reference`); what is O(N D), the
positives' gradient, is shared. "cuda" makes both gradients in one, `gradients`, of the blocks that it `takes`.
Gradients leave the operators in the accumulation dtype and not yet multiplied by the scale: whoever adds to them does
so before the one rounding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastclip.ops._rows import inner_product
from fastclip.ops.contrastive_loss import sums
from fastclip.ops.contrastive_loss.implementations import implementation
from fastclip.ops.contrastive_loss.positives import add_positives
from fastclip.ops.contrastive_loss.reference import accumulation_dtype
from fastclip.ops.contrastive_loss.types import Block

_MASK = "SymInt offset, Tensor? labels, Tensor? row_groups, Tensor? col_groups"
_GROUPS = "Tensor? row_groups, Tensor? col_groups"
_library = torch.library.Library("fastclip", "FRAGMENT")
_library.define(
    f"contrastive_loss_fwd(Tensor image_features, Tensor text_features, Tensor logit_scale, {_MASK},"
    " SymInt kept_rows, str impl)"
    " -> (Tensor positive, Tensor row_max, Tensor row_log_sum, Tensor col_max, Tensor col_log_sum, Tensor kept)"
)
_library.define(
    "contrastive_loss_bwd(Tensor d_positive, Tensor d_row_lse, Tensor d_col_lse,"
    " Tensor image_features, Tensor text_features, Tensor logit_scale,"
    f" Tensor row_max, Tensor row_log_sum, Tensor col_max, Tensor col_log_sum, {_MASK}, Tensor kept, str impl)"
    " -> (Tensor grad_image, Tensor grad_text)"
)
_library.define(
    f"contrastive_sums_fwd(Tensor image_features, Tensor text_features, Tensor logit_scale, {_GROUPS})"
    " -> (Tensor row_sum, Tensor col_sum)"
)
_library.define(
    f"contrastive_sums_bwd(Tensor d_row_sum, Tensor d_col_sum, Tensor image_features, Tensor text_features, {_GROUPS})"
    " -> (Tensor grad_image, Tensor grad_text)"
)


def _fwd(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    offset: int,
    labels: Tensor | None,
    row_groups: Tensor | None,
    col_groups: Tensor | None,
    kept_rows: int,
    impl: str,
) -> tuple[Tensor, ...]:
    with torch.autocast(image_features.device.type, enabled=False):
        kernels = implementation(impl, image_features, text_features)
        scale = logit_scale.to(accumulation_dtype(image_features.dtype))
        kept = scale.new_empty((kept_rows, _kept_width(text_features.shape[0])))
        kept[:, text_features.shape[0] :] = -torch.inf
        mask = (offset, labels, row_groups, col_groups)
        return *kernels.statistics(
            Block(image_features, text_features, scale, *mask, kept if kept_rows else None)
        ), kept


def _kept_width(m: int) -> int:
    """Of rows of m logits: whole blocks of 64, and 16 more so that rows fall on different cache sets."""
    return (m + 63) // 64 * 64 + 16


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
    labels: Tensor | None,
    row_groups: Tensor | None,
    col_groups: Tensor | None,
    kept: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(image_features.device.type, enabled=False):
        kernels = implementation(impl, image_features, text_features)
        scale = logit_scale.to(accumulation_dtype(image_features.dtype))
        mask = (offset, labels, row_groups, col_groups, kept if kept.numel() else None)
        block = Block(image_features, text_features, scale, *mask)
        if hasattr(kernels, "gradients") and kernels.takes(block):
            lse = (row_max, row_log_sum, d_row_lse, col_max, col_log_sum, d_col_lse)
            return kernels.gradients(block, *lse, d_positive)
        row_lse, d_row_lse = _exact_lse(row_max, row_log_sum, d_row_lse)
        col_lse, d_col_lse = _exact_lse(col_max, col_log_sum, d_col_lse)
        grad_image, grad_text = kernels.negative_gradients(block, row_lse, col_lse, d_row_lse, d_col_lse)
        add_positives(grad_image, grad_text, d_positive, image_features, text_features, offset, labels)
        return grad_image, grad_text


def _exact_lse(highest: Tensor, log_sum: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor]:
    """(lse, d) with d exp(z - lse) = d_lse exp(z - highest - log_sum): the rounding of lse, 4e-6 near 100, would be an
    error of the whole row, which d_logit_scale sums. +inf for no negatives: exp(z - lse) is 0."""
    lse = highest + log_sum
    rest = lse - highest
    lost = (highest - (lse - rest)) + (log_sum - rest)  # exactly highest + log_sum - lse (Knuth's two-sum)
    is_empty = lse == -torch.inf
    return lse.masked_fill(is_empty, torch.inf), torch.where(is_empty, d_lse, d_lse * torch.exp(-lost))


def _fwd_fake(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    offset: int,
    labels: Tensor | None,
    row_groups: Tensor | None,
    col_groups: Tensor | None,
    kept_rows: int,
    impl: str,
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(image_features.dtype)
    n, m = image_features.shape[0], text_features.shape[0]
    sizes = (n, n, n, m, m, (kept_rows, _kept_width(m)))
    return tuple(image_features.new_empty(size, dtype=dtype) for size in sizes)


def _sums_fwd(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    row_groups: Tensor | None,
    col_groups: Tensor | None,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(image_features.device.type, enabled=False):
        return sums.sums_of_logits(image_features, text_features, logit_scale, row_groups, col_groups)


def _sums_bwd(
    d_row_sum: Tensor,
    d_col_sum: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    row_groups: Tensor | None,
    col_groups: Tensor | None,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(image_features.device.type, enabled=False):
        return sums.sums_gradients(d_row_sum, d_col_sum, image_features, text_features, row_groups, col_groups)


def _sums_fwd_fake(image_features: Tensor, text_features: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(image_features.dtype)
    rows, columns = (x.new_empty(x.shape[0], dtype=dtype) for x in (image_features, text_features))
    return rows, columns


def _gradients_fake(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(image_features.dtype)
    grad_image, grad_text = (x.new_empty(x.shape, dtype=dtype) for x in (image_features, text_features))
    return grad_image, grad_text


def _bwd_fake(
    d_positive: Tensor, d_row_lse: Tensor, d_col_lse: Tensor, image_features: Tensor, text_features: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return _gradients_fake(image_features, text_features)


def _sums_bwd_fake(
    d_row_sum: Tensor, d_col_sum: Tensor, image_features: Tensor, text_features: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return _gradients_fake(image_features, text_features)


for _name, _kernel, _fake in (
    ("contrastive_loss_fwd", _fwd, _fwd_fake),
    ("contrastive_loss_bwd", _bwd, _bwd_fake),
    ("contrastive_sums_fwd", _sums_fwd, _sums_fwd_fake),
    ("contrastive_sums_bwd", _sums_bwd, _sums_bwd_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"fastclip::{_name}", _fake, lib=_library)


class _ContrastiveBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *mask: Any) -> Any:
        offset, *options, ctx.impl = mask
        *outputs, kept = torch.ops.fastclip.contrastive_loss_fwd(
            image_features, text_features, logit_scale, offset, *options, 0, ctx.impl
        )
        _, row_max, row_log_sum, col_max, col_log_sum = outputs
        ctx.save_for_backward(
            image_features, text_features, logit_scale, row_max, row_log_sum, col_max, col_log_sum, kept, *options
        )
        ctx.mark_non_differentiable(row_max, col_max)
        ctx.offset = offset
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_positive, _, d_row_lse, _, d_col_lse = d_outputs
        image, text, scale, row_max, row_log_sum, col_max, col_log_sum, kept, *options = ctx.saved_tensors
        grad_image, grad_text = torch.ops.fastclip.contrastive_loss_bwd(
            d_positive, d_row_lse, d_col_lse, image, text, scale, row_max, row_log_sum, col_max, col_log_sum,
            ctx.offset, *options, kept, ctx.impl,
        )  # fmt: skip
        return *scaled_gradients(grad_image, grad_text, image, text, scale), None, None, None, None, None


def scaled_gradients(
    grad_image: Tensor, grad_text: Tensor, image: Tensor, text: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for image, text and scale in their dtypes, from dz @ text and dz^T @ image, which it overwrites."""
    d_scale = inner_product(image, grad_image)  # sum_ij dz_ij cos_ij, without a pass over the matrix
    factor = scale.to(grad_image.dtype)
    return grad_image.mul_(factor).to(image.dtype), grad_text.mul_(factor).to(text.dtype), d_scale.to(scale.dtype)


def contrastive_block(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    offset: int = 0,
    impl: str = "auto",
    labels: Tensor | None = None,
    row_groups: Tensor | None = None,
    col_groups: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One rank's block of the logits z = logit_scale * image @ text^T, without ever holding it.

    Args:
        image_features: (n, D).
        text_features: (M, D), same dtype and device; the positive of row i is column offset + i.
        logit_scale: 0-dim, exponentiated.
        offset: 0 <= offset <= M - n, or M for a block without positives.
        impl: "auto", "reference", "dense", "cpu" or "triton".
        labels: (n,) int64, the column of each row's positive instead, distinct; -1 for none.
        row_groups, col_groups: (n,) and (M,) int64: what shares a group is no negative.

    Returns:
        positive (n,), and of the negatives row_max (n,), row_log_sum (n,), col_max (M,), col_log_sum (M,), in fp32
        (fp64 for fp64 input): their log-sum-exp is max + log_sum, -inf where there are none. The maxima are constants
        to autograd: the gradient of the log-sum-exp is that of log_sum. Differentiable once; O(n + M) is kept beside
        the inputs.
    """
    return _ContrastiveBlock.apply(
        image_features, text_features, logit_scale, offset, labels, row_groups, col_groups, impl
    )
