"""LayerNorm by the C++ kernel of csrc/cpu/layer_norm.cpp, for float32 and bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, s, mean, rstd); s is empty without a residual."""
    return torch.ops.fastclip_cpu.layer_norm_fwd(x, residual, weight, bias, eps)


def layer_norm_bwd(
    d_out: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for s and, in fp32, for weight and bias."""
    return torch.ops.fastclip_cpu.layer_norm_bwd(d_out, d_total, total, weight, mean, rstd)
