"""LayerNorm by NVIDIA apex's fused kernel, where it is installed; the residual is added before it."""

from __future__ import annotations

from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """See `fastclip.ops.layer_norm.layer_norm`."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine, mixed_dtype_fused_layer_norm_affine

    total = x if residual is None else x + residual
    if weight.dtype == x.dtype:
        return fused_layer_norm_affine(total, weight, bias, weight.shape, eps), total
    # with weights of another type apex answers in that one
    return mixed_dtype_fused_layer_norm_affine(total, weight, bias, weight.shape, eps).to(x.dtype), total
