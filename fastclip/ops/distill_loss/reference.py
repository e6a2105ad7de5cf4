"""Plain PyTorch on any device, by chunks of rows: memory of constant size beside the columns in fp32."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastclip.ops.contrastive_loss.reference import accumulation_dtype

CHUNK_ELEMENTS, CHUNK_ELEMENTS_CUDA = 1 << 22, 1 << 26  # logits of each model at once: 16 and 256 MB in fp32


def _chunks(
    rows: Tensor, columns: Tensor, scale: Tensor, teacher_rows: Tensor, teacher_columns: Tensor, teacher_scale: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, the student's logits, the teacher's probabilities), both (rows, M) in the student's accumulation dtype."""
    n, m = rows.shape[0], columns.shape[0]
    step = max(1, (CHUNK_ELEMENTS if rows.device.type == "cpu" else CHUNK_ELEMENTS_CUDA) // m)
    dtype, teacher_dtype = accumulation_dtype(rows.dtype), accumulation_dtype(teacher_rows.dtype)
    wide, teacher_wide = columns.to(dtype).T, teacher_columns.to(teacher_dtype).T
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        logits = (rows[part].to(dtype) @ wide).mul_(scale.to(dtype))
        teacher_logits = (teacher_rows[part].to(teacher_dtype) @ teacher_wide).mul_(teacher_scale.to(teacher_dtype))
        yield part, logits, teacher_logits.softmax(1).to(dtype)


def losses(*models: Tensor) -> Tensor:
    """(n,) in the accumulation dtype; rows, columns and scale of the student, then of the teacher."""
    rows = models[0]
    loss = rows.new_empty(rows.shape[0], dtype=accumulation_dtype(rows.dtype))
    for part, logits, target in _chunks(*models):
        loss[part] = target.mul_(logits.log_softmax(1)).sum(1).neg_()
    return loss


def gradients(d_loss: Tensor, *models: Tensor) -> tuple[Tensor, Tensor]:
    """(dz @ columns (n, D), dz^T @ rows (M, D)) of the student, not yet multiplied by the scale; typed as d_loss."""
    rows, columns = models[0], models[1].to(d_loss.dtype)
    grad_rows, grad_columns = torch.empty_like(rows, dtype=d_loss.dtype), torch.zeros_like(columns)
    for part, logits, target in _chunks(*models):
        d_logits = logits.softmax(1).sub_(target).mul_(d_loss[part, None])
        grad_rows[part] = d_logits @ columns
        grad_columns.addmm_(d_logits.T, rows[part].to(d_loss.dtype))
    return grad_rows, grad_columns
