"""Registration: `fastclip::activation_fwd` and `_bwd`, with one autograd.Function outside; x and bias are kept."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_library = torch.library.Library("fastclip", "FRAGMENT")
_library.define("activation_fwd(Tensor x, Tensor? bias, str kind, str impl) -> Tensor")
_library.define(
    "activation_bwd(Tensor d_out, Tensor x, Tensor? bias, str kind, str impl) -> (Tensor d_x, Tensor d_bias)"
)


@cache
def _kernels(impl: str) -> Any:
    return import_module(f"fastclip.ops.activation.{impl}")


def _fwd(x: Tensor, bias: Tensor | None, kind: str, impl: str) -> Tensor:
    return _kernels(impl).activation_fwd(x, bias, kind)


def _bwd(d_out: Tensor, x: Tensor, bias: Tensor | None, kind: str, impl: str) -> tuple[Tensor, Tensor]:
    return _kernels(impl).activation_bwd(d_out, x, bias, kind)


def _fwd_fake(x: Tensor, bias: Tensor | None, kind: str, impl: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _bwd_fake(d_out: Tensor, x: Tensor, bias: Tensor | None, kind: str, impl: str) -> tuple[Tensor, Tensor]:
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return d_x, x.new_empty(x.shape[-1:], dtype=torch.float32)


for _name, _kernel, _fake in (("activation_fwd", _fwd, _fwd_fake), ("activation_bwd", _bwd, _bwd_fake)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"fastclip::{_name}", _fake, lib=_library)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kind: str, impl: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.options = (kind, impl)
        return torch.ops.fastclip.activation_fwd(x, bias, kind, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        d_x, d_bias = torch.ops.fastclip.activation_bwd(d_out, x, bias, *ctx.options)
        return d_x, None if bias is None else d_bias.to(bias.dtype), None, None


def activation(x: Tensor, bias: Tensor | None, kind: str, impl: str) -> Tensor:
    """`fastclip.ops.activation.activation` by "cpu" or "triton"."""
    return _Activation.apply(x, bias, kind, impl)
