"""One rank's images against some of the texts: what the losses take from the operators, forward and backward.

Statistics come as rows (n,) and columns, gradients in the accumulation dtype and not yet multiplied by the scale.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.distributed import Layout

Mask = tuple[int, Tensor | None]  # the block's offset, or the labels of its rows
Lse = tuple[Tensor, Tensor, Tensor, Tensor]


class Problem(NamedTuple):
    """This rank's part of a contrastive loss."""

    image: Tensor  # (n, D)
    text: Tensor  # (m, D)
    scale: Tensor  # 0-dim
    labels: Tensor | None  # (n,) among this rank's texts; None: text i for image i
    image_ids: Tensor | None  # (n,)
    text_ids: Tensor | None  # (m,)
    layout: Layout
    ignores: bool  # the rest of a group is left out
    sums: tuple[bool, ...]  # the sums of logits that are wanted: over the group (True), over all (False)
    kept_rows: int  # of how many rows the logits are kept from forward to backward
    impl: str


def block_statistics(
    problem: Problem, text: Tensor, text_ids: Tensor | None, mask: Mask
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """[positive, row_max, row_log_sum, *row_sums] (n,) and [col_max, col_log_sum, *col_sums] (M,) of text (M, D), and
    the logits that are kept."""
    image, scale = problem.image, problem.scale
    groups = _groups(problem, text_ids, problem.ignores)
    positive, row_max, row_log_sum, col_max, col_log_sum, kept = torch.ops.fastclip.contrastive_loss_fwd(
        image, text, scale, *mask, *groups, problem.kept_rows, problem.impl
    )
    rows, columns = [positive, row_max, row_log_sum], [col_max, col_log_sum]
    for over_group in problem.sums:
        groups = _groups(problem, text_ids, over_group)
        row_sum, col_sum = torch.ops.fastclip.contrastive_sums_fwd(image, text, scale, *groups)
        rows.append(row_sum)
        columns.append(col_sum)
    return rows, columns, kept


def block_gradients(
    problem: Problem,
    text: Tensor,
    text_ids: Tensor | None,
    mask: Mask,
    lse: Lse,
    kept: Tensor,
    d_positive: Tensor,
    d_rows: list[Tensor],
    d_columns: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """dz @ text (n, D) and dz^T @ image (M, D).

    lse: of the negatives of the rows (n,) and of the columns (M,), max and log sum, over all ranks.
    kept: the logits that `block_statistics` kept.
    d_rows, d_columns: the gradients of their log sum, and then of each of the sums.
    """
    groups = _groups(problem, text_ids, problem.ignores)
    image, scale, impl = problem.image, problem.scale, problem.impl
    grad_image, grad_text = torch.ops.fastclip.contrastive_loss_bwd(
        d_positive, d_rows[0], d_columns[0], image, text, scale, *lse, *mask, *groups, kept, impl
    )
    for over_group, d_row, d_column in zip(problem.sums, d_rows[1:], d_columns[1:], strict=True):
        groups = _groups(problem, text_ids, over_group)
        more_image, more_text = torch.ops.fastclip.contrastive_sums_bwd(d_row, d_column, image, text, *groups)
        grad_image, grad_text = grad_image.add_(more_image), grad_text.add_(more_text)
    return grad_image, grad_text


def _groups(problem: Problem, text_ids: Tensor | None, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    return (problem.image_ids, text_ids) if wanted else (None, None)
