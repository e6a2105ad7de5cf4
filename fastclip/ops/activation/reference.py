"""What the activations mean: plain PyTorch, any device, any float dtype (half types are computed in fp32)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("gelu", "gelu_tanh", "quick_gelu")
QUICK_GELU_SLOPE = 1.702


def activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """See `fastclip.ops.activation`."""
    if kind != "quick_gelu" and bias is None:  # PyTorch's own computes half types in fp32 too
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    z = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    z = z if bias is None else z + bias.to(z.dtype)
    if kind == "quick_gelu":
        # z sigmoid(slope z), written with SiLU so that autograd keeps one tensor and not two
        return (F.silu(QUICK_GELU_SLOPE * z) / QUICK_GELU_SLOPE).to(x.dtype)
    return F.gelu(z, approximate="tanh" if kind == "gelu_tanh" else "none").to(x.dtype)
