"""The compiled CPU kernel (csrc/cpu/contrastive_loss.cpp): float32 and bfloat16 features, all sums in fp32."""

import torch
from torch import Tensor

from fastclip.ops.contrastive_loss.types import Statistics


def statistics(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    offset: int,
    labels: Tensor | None = None,
    row_groups: Tensor | None = None,
    col_groups: Tensor | None = None,
    kept: Tensor | None = None,
) -> Statistics:
    """As `reference.statistics`."""
    kernel = torch.ops.fastclip_cpu.contrastive_loss_statistics
    return Statistics(*kernel(image_features, text_features, logit_scale, offset, labels, row_groups, col_groups, kept))


def negative_gradients(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    d_row_lse: Tensor,
    d_col_lse: Tensor,
    offset: int,
    labels: Tensor | None = None,
    row_groups: Tensor | None = None,
    col_groups: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.negative_gradients`."""
    kernel = torch.ops.fastclip_cpu.contrastive_loss_negative_gradients
    features, weights = (image_features, text_features), (row_lse, col_lse, d_row_lse, d_col_lse)
    return kernel(*features, logit_scale, *weights, offset, labels, row_groups, col_groups, kept)
