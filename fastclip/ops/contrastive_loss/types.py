"""What an implementation of the contrastive block returns."""

from typing import NamedTuple

from torch import Tensor


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
