"""The specification of the contrastive block: plain PyTorch on any device, exact in fp64, O(N) memory by chunks of
rows.

With z_ij = logit_scale * image_i . text_j, and for row i one positive, in column labels_i or offset + i:

    row_max_i = max_{j negative for i} z_ij        row_log_sum_i = log sum_{j negative for i} exp(z_ij - row_max_i)

and the same for columns. The negatives are all other entries, less those whose row and column are of one group when
groups are given. Leaving the positive out is what keeps a converged batch exact: the loss of row i is
softplus(row_lse_i - z_ip), whose value and gradient keep their relative accuracy however small they are, while a
log-sum-exp over all columns less z_ip cancels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastclip.ops.contrastive_loss.types import Block, Statistics

CHUNK_ELEMENTS = 1 << 22  # logits held at once: 16 MB in fp32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split_positives(
    logits: Tensor,
    offset: int,
    labels: Tensor | None = None,
    row_groups: Tensor | None = None,
    col_groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(positives (n,), negatives (n, M)): the negatives are `logits` with -inf elsewhere, in place.

    The positive of row i is in column labels_i, or offset + i without labels; NaN where that is no column.
    """
    n, m = logits.shape
    labels = offset + torch.arange(n, device=logits.device) if labels is None else labels
    is_there, column = (labels >= 0) & (labels < m), labels.clamp(0, m - 1)[:, None]
    value = logits.gather(1, column).squeeze(1)
    logits.scatter_(1, column, torch.where(is_there, -torch.inf, value)[:, None])
    if row_groups is not None and col_groups is not None:
        logits.masked_fill_(row_groups[:, None] == col_groups, -torch.inf)
    return torch.where(is_there, value, torch.nan), logits


def max_and_log_sum(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(max, log sum exp(z - max)) over `dim`; both -inf where all are."""
    highest = logits.amax(dim, keepdim=True)
    anchored = logits - highest.masked_fill(highest == -torch.inf, 0)
    return highest.squeeze(dim), anchored.exp_().sum(dim).log_()


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(max, log_sum) of two sets from those of each."""
    highest = torch.maximum(a[0], b[0])
    anchor = highest.masked_fill(highest == -torch.inf, 0)
    return highest, torch.logaddexp(a[0] - anchor + a[1], b[0] - anchor + b[1])


def d_negative_logits(logits: Tensor, row_lse: Tensor, col_lse: Tensor, d_row_lse: Tensor, d_col_lse: Tensor) -> Tensor:
    """dz_ij = d_row_lse_i exp(z_ij - row_lse_i) + d_col_lse_j exp(z_ij - col_lse_j), zero where z is -inf; (n, M)."""
    return d_row_lse[:, None] * (logits - row_lse[:, None]).exp_() + d_col_lse * (logits - col_lse).exp_()


def _row_chunks(n: int, m: int) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // m)
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def _widened(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _split(block: Block, rows: slice) -> tuple[Tensor, Tensor]:
    """The positives of some rows, and the logits of their negatives; the text in the accumulation dtype."""
    image, text, scale, offset, labels, row_groups, col_groups, _ = block
    logits = scale * (_widened(image[rows]) @ text.T)
    labels, row_groups = (None if x is None else x[rows] for x in (labels, row_groups))
    return split_positives(logits, offset + rows.start, labels, row_groups, col_groups)


def statistics(block: Block) -> Statistics:
    """The block's statistics; fills `block.kept`."""
    n, kept, text = block.image_features.shape[0], block.kept, _widened(block.text_features)
    m, block = text.shape[0], block._replace(text_features=text)
    positive, row_max, row_log_sum = (text.new_empty(n) for _ in range(3))
    columns = (text.new_full((m,), -torch.inf), text.new_full((m,), -torch.inf))
    for rows in _row_chunks(n, m):
        positive[rows], logits = _split(block, rows)
        if kept is not None and rows.start < kept.shape[0]:
            kept[rows, :m] = logits[: kept.shape[0] - rows.start]
        row_max[rows], row_log_sum[rows] = max_and_log_sum(logits, 1)
        columns = merge(columns, max_and_log_sum(logits, 0))
    return Statistics(positive, row_max, row_log_sum, *columns)


def negative_gradients(
    block: Block, row_lse: Tensor, col_lse: Tensor, d_row_lse: Tensor, d_col_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """(dz @ text (n, D), dz^T @ image (M, D)) of the negatives, not yet multiplied by the scale, in the accumulation
    dtype.

    row_lse and col_lse are max + log_sum, or +inf where there are no negatives (so that nothing flows there); they may
    be those of a larger matrix that this is a block of.
    """
    kept, text = block.kept, _widened(block.text_features)
    block = block._replace(text_features=text)
    grad_image, grad_text = text.new_empty(block.image_features.shape), torch.zeros_like(text)
    for rows in _row_chunks(block.image_features.shape[0], text.shape[0]):
        if kept is not None and rows.stop <= kept.shape[0]:
            logits = kept[rows, : text.shape[0]]
        else:
            _, logits = _split(block, rows)
        d_logits = d_negative_logits(logits, row_lse[rows], col_lse, d_row_lse[rows], d_col_lse)
        grad_image[rows] = d_logits @ text
        grad_text.addmm_(d_logits.T, block.image_features[rows].to(text.dtype))
    return grad_image, grad_text
