"""The activations of CLIP's towers, of x + bias, keeping x alone for backward.

    gelu         z Phi(z), Phi the normal distribution function (Hendrycks and Gimpel 2016)
    gelu_tanh    z sigmoid(2 sqrt(2 / pi) (z + 0.044715 z^3)), its approximation, written with tanh elsewhere
    quick_gelu   z sigmoid(1.702 z), OpenAI's

Implementations: `reference` (PyTorch's), `cpu` (C++) and `triton`, in one pass each way, the bias's gradient within.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.ops import _dispatch, _elementwise
from fastclip.ops.activation import op, reference
from fastclip.ops.activation.reference import KINDS

__all__ = ["IMPLS", "KINDS", "activation", "explain"]

IMPLS = ("reference", "cpu", "triton")
_OP = _elementwise.ElementwiseOp("activation", IMPLS)


def activation(x: Tensor, bias: Tensor | None = None, *, kind: str = "gelu", impl: str = "auto") -> Tensor:
    """The activation of x + bias: (..., W) and (W,) -> (..., W), computed in fp32 or better, in the dtype of x.

    kind: "gelu", "gelu_tanh" or "quick_gelu".
    impl: "auto", "reference", "cpu" or "triton".
    Raises ValueError for an unknown kind, a bias that does not fit, or an impl that cannot run here, with the reason.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, must be one of {', '.join(KINDS)}")
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"x must be (..., W) of a float dtype, was {tuple(x.shape)} of {x.dtype}")
    if bias is not None and (bias.shape != x.shape[-1:] or bias.device != x.device):
        raise ValueError(
            f"bias must be {tuple(x.shape[-1:])} on {x.device} like x, was {tuple(bias.shape)} on {bias.device}"
        )
    name = _OP.pick(impl, _order(x.device.type, kind), x, kind)
    return reference.activation(x, bias, kind) if name == "reference" else op.activation(x, bias, kind, name)


def _order(device_type: str, kind: str) -> tuple[str, ...]:
    """What "auto" tries, best first.

    On the CPU PyTorch's GELU is ahead of ours, and ours of its others. On CUDA what was measured goes before; without,
    "auto" is PyTorch's own, but for QuickGELU, of which PyTorch's operators would keep an fp32 copy for backward.
    """
    if device_type == "cpu":
        return ("reference",) if kind == "gelu" else ("cpu", "reference")
    return ("triton", "reference") if kind == "quick_gelu" else ("reference",)


def explain(device_type: str, dtype: torch.dtype, kind: str = "gelu") -> list[_dispatch.Verdict]:
    """Which implementation "auto" takes, why, and why not the others."""
    return _OP.explain(_order(device_type, kind), device_type, dtype, kind)
