"""What LayerNorm with a residual means: plain PyTorch, any device, any float dtype (statistics in fp32 or better)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """See `fastclip.ops.layer_norm.layer_norm`."""
    total = x if residual is None else x + residual
    if weight.dtype == total.dtype:  # PyTorch's own computes half types in fp32 too
        return F.layer_norm(total, weight.shape, weight, bias, eps), total
    wide = total.float() if total.dtype in (torch.float16, torch.bfloat16) else total
    weight, bias = weight.to(wide.dtype), bias.to(wide.dtype)
    return F.layer_norm(wide, weight.shape, weight, bias, eps).to(x.dtype), total
