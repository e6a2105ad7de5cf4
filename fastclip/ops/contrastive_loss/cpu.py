"""The compiled CPU kernel (csrc/cpu/contrastive_loss.cpp): float32 and bfloat16 features, all sums in fp32."""

import torch
from torch import Tensor

from fastclip.ops.contrastive_loss.types import Block, Statistics


def statistics(block: Block) -> Statistics:
    """As `reference.statistics`."""
    kernel = torch.ops.fastclip_cpu.contrastive_loss_statistics
    return Statistics(*kernel(*block))


def negative_gradients(
    block: Block, row_lse: Tensor, col_lse: Tensor, d_row_lse: Tensor, d_col_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """As `reference.negative_gradients`."""
    kernel = torch.ops.fastclip_cpu.contrastive_loss_negative_gradients
    return kernel(*block[:3], row_lse, col_lse, d_row_lse, d_col_lse, *block[3:])
