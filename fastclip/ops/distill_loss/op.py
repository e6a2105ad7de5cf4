"""Registration: `fastclip::distill_loss_fwd` and `_bwd`, one rank's rows, with one autograd.Function outside."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastclip.ops._rows import inner_product
from fastclip.ops.contrastive_loss.reference import accumulation_dtype
from fastclip.ops.distill_loss import reference

Side = tuple[Tensor, Tensor, Tensor]  # rows (n, D), columns (M, D), scale 0-dim: logits = scale * rows @ columns^T

_MODELS = "Tensor rows, Tensor columns, Tensor scale, Tensor teacher_rows, Tensor teacher_columns, Tensor teacher_scale"
_library = torch.library.Library("fastclip", "FRAGMENT")
_library.define(f"distill_loss_fwd({_MODELS}) -> Tensor")
_library.define(f"distill_loss_bwd(Tensor d_loss, {_MODELS}) -> (Tensor grad_rows, Tensor grad_columns)")


def _fwd(*models: Tensor) -> Tensor:
    with torch.autocast(models[0].device.type, enabled=False):
        return reference.losses(*models)


def _bwd(d_loss: Tensor, *models: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(d_loss.device.type, enabled=False):
        return reference.gradients(d_loss, *models)


def _fwd_fake(rows: Tensor, *_: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=accumulation_dtype(rows.dtype))


def _bwd_fake(d_loss: Tensor, rows: Tensor, columns: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape, dtype=d_loss.dtype), columns.new_empty(columns.shape, dtype=d_loss.dtype)


for _name, _kernel, _fake in (("distill_loss_fwd", _fwd, _fwd_fake), ("distill_loss_bwd", _bwd, _bwd_fake)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"fastclip::{_name}", _fake, lib=_library)


class _DistillRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *models: Tensor) -> Tensor:
        ctx.save_for_backward(*models)
        return torch.ops.fastclip.distill_loss_fwd(*models)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, *_ = ctx.saved_tensors
        grad_rows, grad_columns = torch.ops.fastclip.distill_loss_bwd(d_loss, *ctx.saved_tensors)
        d_scale, factor = inner_product(rows, grad_rows).to(scale.dtype), scale.to(d_loss.dtype)
        d_student = (grad_rows.mul_(factor).to(rows.dtype), grad_columns.mul_(factor).to(columns.dtype), d_scale)
        return *d_student, None, None, None


def distill_rows(student: Side, teacher: Side) -> Tensor:
    """The teacher's cross-entropy to the student, row by row, in O(n + M) memory.

    Args:
        student: rows (n, D), columns (M, D), scale 0-dim (exponentiated).
        teacher: the same n and M, any D, on the same device; constants, no gradient flows to them.

    Returns:
        (n,) in fp32 (fp64 for fp64 features). Differentiable once; backward makes both models' logits again, in chunks
        of constant size.
    """
    return _DistillRows.apply(*student, *(x.detach() for x in teacher))
