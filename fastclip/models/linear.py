"""A product whose input backward makes again instead of keeping it: as large as its source, and cheap to make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Again = Callable[..., Tensor]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, again: Again, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *kept)
        ctx.again, ctx.has_bias = again, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        weight, *kept = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = d_out.flatten(0, -2)
        d_x = d_out @ weight if needs_x else None
        d_weight = rows.T @ ctx.again(*kept).to(weight.dtype).flatten(0, -2) if needs_weight else None
        d_bias = rows.sum(0) if ctx.has_bias and needs_bias else None
        return d_x, d_weight, d_bias, None, *(None for _ in kept)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, again: Again | None, *kept: Tensor) -> Tensor:
    """x weight^T + bias, where backward uses `again(*kept)` for x, which must be the same numbers.

    Gradients reach what x was made of through x alone. Without `again` x is kept, as in a compiled graph, whose
    compiler decides what to keep.
    """
    if again is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        return _Linear.apply(x, weight, bias, again, *kept)


class Linear(nn.Linear):
    """`nn.Linear` that can be told how backward makes its input again: see `linear`."""

    def forward(self, input: Tensor, again: Again | None = None, *kept: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(input, self.weight, self.bias, again, *kept)
