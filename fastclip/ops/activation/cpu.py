"""The activations by the C++ kernel of csrc/cpu/activation.cpp, for float32 and bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor


def activation_fwd(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The activation of x + bias."""
    return torch.ops.fastclip_cpu.activation_fwd(x, bias, kind)


def activation_bwd(d_out: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """The gradients for x and, in fp32, for the bias."""
    return torch.ops.fastclip_cpu.activation_bwd(d_out, x, bias, kind)
