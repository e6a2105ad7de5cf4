"""Registration: `fastclip::layer_norm_fwd` and `_bwd`, with one autograd.Function outside.

The residual and x have one gradient, in which the gradient of the sum's other uses is added within the kernel.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_library = torch.library.Library("fastclip", "FRAGMENT")
_library.define(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, str impl)"
    " -> (Tensor out, Tensor total, Tensor mean, Tensor rstd)"
)
_library.define(
    "layer_norm_bwd(Tensor d_out, Tensor? d_total, Tensor total, Tensor weight, Tensor mean, Tensor rstd, str impl)"
    " -> (Tensor d_x, Tensor d_weight, Tensor d_bias)"
)


@cache
def _kernels(impl: str) -> Any:
    return import_module(f"fastclip.ops.layer_norm.{impl}")


def _fwd(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, impl: str) -> tuple[Tensor, ...]:
    return _kernels(impl).layer_norm_fwd(x, residual, weight, bias, eps)


def _bwd(
    d_out: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, impl: str
) -> tuple[Tensor, ...]:
    return _kernels(impl).layer_norm_bwd(d_out, d_total, total, weight, mean, rstd)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fwd_fake(x: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    rows = x.shape[:-1].numel()
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return _like(x), x.new_empty(0) if residual is None else _like(x), mean, rstd


def _bwd_fake(
    d_out: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    d_weight, d_bias = (weight.new_empty(weight.shape, dtype=torch.float32) for _ in range(2))
    return _like(total), d_weight, d_bias


for _name, _kernel, _fake in (("layer_norm_fwd", _fwd, _fwd_fake), ("layer_norm_bwd", _bwd, _bwd_fake)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"fastclip::{_name}", _fake, lib=_library)


class _LayerNorm(torch.autograd.Function):
    """y alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, impl: str) -> Tensor:
        out, _, mean, rstd = torch.ops.fastclip.layer_norm_fwd(x, None, weight, bias, eps, impl)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.impl, ctx.bias_dtype = impl, bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        d_x, d_weight, d_bias = torch.ops.fastclip.layer_norm_bwd(d_out, None, x, weight, mean, rstd, ctx.impl)
        return d_x, d_weight.to(weight.dtype), d_bias.to(ctx.bias_dtype), None, None


class _AddLayerNorm(torch.autograd.Function):
    """(y, s) of a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, impl: str) -> Any:
        out, total, mean, rstd = torch.ops.fastclip.layer_norm_fwd(x, residual, weight, bias, eps, impl)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.impl, ctx.bias_dtype = impl, bias.dtype
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_total: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, mean, rstd = ctx.saved_tensors
        d_x, d_weight, d_bias = torch.ops.fastclip.layer_norm_bwd(d_out, d_total, total, weight, mean, rstd, ctx.impl)
        return d_x, d_x, d_weight.to(weight.dtype), d_bias.to(ctx.bias_dtype), None, None


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    """`fastclip.ops.layer_norm.layer_norm` by "cpu" or "triton"."""
    if residual is None:
        return _LayerNorm.apply(x, weight, bias, eps, impl), x
    return _AddLayerNorm.apply(x, residual, weight, bias, eps, impl)
