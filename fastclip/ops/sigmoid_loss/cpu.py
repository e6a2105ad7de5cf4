"""The compiled CPU kernel (csrc/cpu/sigmoid_loss.cpp): float32 features, and bfloat16 with fp32 logits and sums."""

import torch
from torch import Tensor

from fastclip.ops.sigmoid_loss.types import Block, Gradients


def losses(block: Block) -> Tensor:
    """As `reference.losses`."""
    return torch.ops.fastclip_cpu.sigmoid_loss(*block)


def losses_and_gradients(block: Block, weights: Tensor) -> Gradients:
    """As `reference.losses_and_gradients`."""
    return Gradients(*torch.ops.fastclip_cpu.sigmoid_loss_gradients(*block, weights))
