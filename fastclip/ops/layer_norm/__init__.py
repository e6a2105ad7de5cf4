"""LayerNorm, with the addition of the residual in the same pass (Ba et al. 2016; pre-norm blocks).

    s = x + residual, y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

Statistics are fp32 or better whatever the dtype of x; y and s come in that dtype. Kept for backward: s, mean and
1 / sqrt(var + eps) of each row. Implementations: `reference` (PyTorch's), `cpu` (C++), `triton`, and by name `apex`
(NVIDIA's FusedLayerNorm) where it is installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.ops import _dispatch, _elementwise
from fastclip.ops.layer_norm import apex, op, reference

__all__ = ["IMPLS", "explain", "layer_norm"]

IMPLS = ("reference", "cpu", "triton", "apex")
_OP = _elementwise.ElementwiseOp("layer_norm", IMPLS)
_KIND = ("", "with a residual")
_COMPOSED = {"reference": reference, "apex": apex}


def layer_norm(
    x: Tensor,  # (..., W)
    weight: Tensor,  # (W,)
    bias: Tensor,  # (W,)
    residual: Tensor | None = None,  # (..., W)
    *,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(y, s): the normalised sum and the sum itself, which is x where there is no residual.

    impl: "auto", "reference", "cpu", "triton" or "apex".
    Raises ValueError for shapes that do not fit, or an impl that cannot run here, with the reason.
    """
    width = tuple(x.shape[-1:])
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"x must be (..., W) of a float dtype, was {tuple(x.shape)} of {x.dtype}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if tuple(parameter.shape) != width or parameter.device != x.device:
            raise ValueError(
                f"{name} must be {width} on {x.device} like x, was {tuple(parameter.shape)} on {parameter.device}"
            )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {tuple(x.shape)} of {x.dtype} like x, was {tuple(residual.shape)} of {residual.dtype}"
        )
    has_residual = residual is not None
    name = _OP.pick(impl, _order(x.device.type, x.dtype, has_residual), x, _KIND[has_residual])
    if name in _COMPOSED:
        return _COMPOSED[name].layer_norm(x, weight, bias, residual, eps)
    return op.layer_norm(x, weight, bias, residual, eps, name)


def _order(device_type: str, dtype: torch.dtype, has_residual: bool) -> tuple[str, ...]:
    """What "auto" tries, best first. On the CPU ours is ahead of PyTorch's in bfloat16 with a residual. On CUDA
    what was measured goes before; without, "auto" is PyTorch's own."""
    is_ahead = device_type == "cpu" and dtype == torch.bfloat16 and has_residual
    return ("cpu", "reference") if is_ahead else ("reference",)


def explain(device_type: str, dtype: torch.dtype, has_residual: bool = True) -> list[_dispatch.Verdict]:
    """Which implementation "auto" takes, why, and why not the others."""
    return _OP.explain(_order(device_type, dtype, has_residual), device_type, dtype, _KIND[has_residual])
