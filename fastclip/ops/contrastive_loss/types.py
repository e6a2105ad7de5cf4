"""What an implementation of the contrastive block is given and returns."""

from typing import NamedTuple

from torch import Tensor


class Block(NamedTuple):
    """One rank's rows against all columns."""

    image_features: Tensor  # (n, D)
    text_features: Tensor  # (M, D)
    logit_scale: Tensor  # 0-dim, in the accumulation dtype
    offset: int  # without labels, the positive of row i is column offset + i; M says that the block has none
    labels: Tensor | None  # (n,) int64, the column of each row's positive, no two the same; -1 for none
    row_groups: Tensor | None  # (n,) int64, or None: what shares a group is no negative
    col_groups: Tensor | None  # (M,) int64, None with row_groups
    # (k, at least M), k <= n: `statistics` writes the negatives of the first k rows there, -inf elsewhere, and
    # `negative_gradients` does not make them again. Rows at its end may be left out, and are then made again.
    kept: Tensor | None


class Statistics(NamedTuple):
    """The positives' logits, and of the negatives log sum_j exp(z_ij) = max_i + log_sum_i.

    The two parts stay apart so that differences from the maximum are exact; both are -inf where there are no negatives.
    All are fp32, or fp64 for fp64 input. Positives come from the same products as negatives, so equal pairs tie
    exactly; a row without one has NaN (of a block without any, whatever stands there).
    """

    positive: Tensor  # (n,)
    row_max: Tensor  # (n,)
    row_log_sum: Tensor  # (n,)
    col_max: Tensor  # (M,)
    col_log_sum: Tensor  # (M,)
