"""The whole N x M matrix at once, through the library's matrix product: few launches, for blocks small enough to hold.

16-bit features keep their tensor cores on CUDA with fp32 logits (a 16-bit logit is wrong by up to 0.25 at scale 100);
elsewhere they are widened. Nothing N x M outlives a call.
"""

import torch
from torch import Tensor

from fastclip.ops.contrastive_loss import reference
from fastclip.ops.contrastive_loss.types import Block, Statistics

MAX_ELEMENTS = 1 << 26  # 256 MB of fp32 logits


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 accumulation and an fp32 result (fp64 for fp64)."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = reference.accumulation_dtype(a.dtype)
    return a.to(dtype) @ b.to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the total's fp32."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += product(a, b)


def statistics(block: Block) -> Statistics:
    """As `reference.statistics`."""
    positive, logits = _split(block)
    if block.kept is not None:
        block.kept[:, : logits.shape[1]] = logits[: block.kept.shape[0]]
    return Statistics(positive, *reference.max_and_log_sum(logits, 1), *reference.max_and_log_sum(logits, 0))


def negative_gradients(
    block: Block, row_lse: Tensor, col_lse: Tensor, d_row_lse: Tensor, d_col_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """As `reference.negative_gradients`."""
    image_features, text_features, kept = block.image_features, block.text_features, block.kept
    if kept is not None and kept.shape[0] == image_features.shape[0]:
        logits = kept[:, : text_features.shape[0]]
    else:
        _, logits = _split(block)
    d_logits = reference.d_negative_logits(logits, row_lse, col_lse, d_row_lse, d_col_lse)
    return d_logits @ text_features.to(d_logits.dtype), d_logits.T @ image_features.to(d_logits.dtype)


def _split(block: Block) -> tuple[Tensor, Tensor]:
    """The positives, and the matrix of the negatives."""
    logits = product(block.image_features, block.text_features.T).mul_(block.logit_scale)
    return reference.split_positives(logits, block.offset, block.labels, block.row_groups, block.col_groups)
