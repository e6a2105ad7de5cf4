"""Sums of logits over whole groups, or over everything, in O(N D): what several positives and label smoothing need.

They are linear in the logits z_ij = logit_scale * image_i . text_j, so the features are summed and no logit is made:

    row_sum_i = sum_{j of i's group} z_ij = logit_scale * image_i . (sum_{j of i's group} text_j)

and the same for columns; without groups, every entry counts. The sums run in the order of the rows: the same result
every time, on CUDA too.
"""

import torch
from torch import Tensor

from fastclip.ops.contrastive_loss.reference import accumulation_dtype


def group_sum(x: Tensor, ids: Tensor | None, queries: Tensor | None) -> Tensor:
    """sum_{j: ids_j = queries_i} x_j (Q, D), of x (N, D) with ids (N,); without ids the sum of all of x, (1, D)."""
    if ids is None or queries is None:
        return x.sum(0, keepdim=True)
    ordered, order = ids.sort(stable=True)
    segment = torch.cat((ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long())).cumsum(0)
    sums = torch.zeros_like(x)
    if x.is_cuda:  # index_add_ adds in any order there; this sorts first
        sums.index_put_((segment,), x[order], accumulate=True)
    else:
        sums.index_add_(0, segment, x[order])
    first = torch.searchsorted(ordered, queries).clamp_(max=ids.shape[0] - 1)
    return torch.where((ordered[first] == queries)[:, None], sums[segment[first]], 0)


def group_size(ids: Tensor, queries: Tensor) -> Tensor:
    """How many of ids (N,) equal each of queries (Q,), (Q,) int64."""
    ordered = ids.sort().values
    return torch.searchsorted(ordered, queries, right=True) - torch.searchsorted(ordered, queries)


def sums_of_logits(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    row_groups: Tensor | None,
    col_groups: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(row_sum (n,), col_sum (M,)) in the accumulation dtype; groups int64 (n,) and (M,), or neither."""
    dtype = accumulation_dtype(image_features.dtype)
    image, text = image_features.to(dtype), text_features.to(dtype)
    row_sum = (image * group_sum(text, col_groups, row_groups)).sum(1)
    col_sum = (text * group_sum(image, row_groups, col_groups)).sum(1)
    return row_sum.mul_(logit_scale), col_sum.mul_(logit_scale)


def sums_gradients(
    d_row_sum: Tensor,
    d_col_sum: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    row_groups: Tensor | None,
    col_groups: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dz @ text (n, D), dz^T @ image (M, D)), not yet multiplied by the scale, in the accumulation dtype."""
    dtype = accumulation_dtype(image_features.dtype)
    image, text, d_row, d_col = (
        image_features.to(dtype),
        text_features.to(dtype),
        d_row_sum[:, None],
        d_col_sum[:, None],
    )
    grad_image = d_row * group_sum(text, col_groups, row_groups) + group_sum(d_col * text, col_groups, row_groups)
    grad_text = d_col * group_sum(image, row_groups, col_groups) + group_sum(d_row * image, row_groups, col_groups)
    return grad_image, grad_text
