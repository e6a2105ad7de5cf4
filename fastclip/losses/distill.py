"""open_clip's `DistillClipLoss` over `ClipLoss`, its distillation term in O(N) memory."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastclip.distributed import all_gather, all_reduce_sum
from fastclip.losses.clip import ClipLoss, _ScaleGradient
from fastclip.losses.ranks import group_of
from fastclip.ops.contrastive_loss.reference import accumulation_dtype

_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_CUDA = 1 << 22, 1 << 26  # logits of each model at once: 16 and 256 MB in fp32

Side = tuple[Tensor, Tensor, Tensor]  # rows (n, D), columns (M, D), scale 0-dim: logits = scale * rows @ columns^T


def _chunks(
    left: Tensor, right: Tensor, scale: Tensor, teacher_left: Tensor, teacher_right: Tensor, teacher_scale: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, the student's logits, the teacher's probabilities), both (rows, M) in the accumulation dtype."""
    n, m = left.shape[0], right.shape[0]
    step = max(1, (_CHUNK_ELEMENTS if left.device.type == "cpu" else _CHUNK_ELEMENTS_CUDA) // m)
    dtype, teacher_dtype = accumulation_dtype(left.dtype), accumulation_dtype(teacher_left.dtype)
    columns, teacher_columns = right.to(dtype).T, teacher_right.to(teacher_dtype).T
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        logits = (left[rows].to(dtype) @ columns).mul_(scale.to(dtype))
        teacher_logits = (teacher_left[rows].to(teacher_dtype) @ teacher_columns).mul_(teacher_scale.to(teacher_dtype))
        yield rows, logits, teacher_logits.softmax(1).to(dtype)


class _DistillRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        left = tensors[0]
        loss = left.new_empty(left.shape[0], dtype=accumulation_dtype(left.dtype))
        with torch.autocast(loss.device.type, enabled=False):
            for rows, logits, target in _chunks(*tensors):
                loss[rows] = target.mul_(logits.log_softmax(1)).sum(1).neg_()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        left, right, scale, *_ = ctx.saved_tensors
        columns = right.to(d_loss.dtype)
        grad_left, grad_right = torch.empty_like(left, dtype=d_loss.dtype), torch.zeros_like(columns)
        with torch.autocast(d_loss.device.type, enabled=False):
            for rows, logits, target in _chunks(*ctx.saved_tensors):
                d_logits = logits.softmax(1).sub_(target).mul_(d_loss[rows, None])
                grad_left[rows] = d_logits @ columns
                grad_right.addmm_(d_logits.T, left[rows].to(d_loss.dtype))
        d_scale = (left.to(d_loss.dtype) * grad_left).sum().to(scale.dtype)
        factor = scale.to(d_loss.dtype)
        return (
            grad_left.mul_(factor).to(left.dtype),
            grad_right.mul_(factor).to(right.dtype),
            d_scale,
            None,
            None,
            None,
        )


def distill_rows(student: Side, teacher: Side) -> Tensor:
    """The teacher's cross-entropy to the student, row by row, in O(n + M) memory.

    With z = scale * rows @ columns^T of each model and p its softmax over the M columns:

        loss_i = -sum_j p_teacher_ij log p_student_ij = lse(z_student_i) - sum_j p_teacher_ij z_student_ij

    Args:
        student: rows (n, D), columns (M, D), scale 0-dim (exponentiated).
        teacher: the same n and M, any D, on the same device; constants, no gradient flows to them.

    Returns:
        (n,) in fp32 (fp64 for fp64 features). Differentiable once; backward makes both models' logits again, in chunks
        of constant size.
    """
    return _DistillRows.apply(*student, *(x.detach() for x in teacher))


class DistillClipLoss(ClipLoss):
    """open_clip's `DistillClipLoss`, same arguments as `ClipLoss`, without its four N x N matrices.

    The second loss is the mean over pairs and both directions of `distill_rows`. The teacher is a constant: where
    open_clip would send a gradient to teacher features that ask for one (its trainer makes them without), none flows.
    """

    def forward(  # type: ignore[override]  # open_clip's call
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive loss, distillation loss), or {"contrastive_loss", "distill_loss"}.

        Args:
            image_features, text_features: the student's, (n, D), normalised.
            logit_scale: the student's, exponentiated.
            dist_image_features, dist_text_features: the teacher's, (n, D of the teacher).
            dist_logit_scale: the teacher's, exponentiated.
        """
        contrastive = super().forward(image_features, text_features, logit_scale)
        assert isinstance(contrastive, Tensor)
        _check_teacher(image_features, dist_image_features, dist_text_features, dist_logit_scale)
        student = (image_features, text_features, logit_scale.reshape(()))
        teacher = (dist_image_features.detach(), dist_text_features.detach(), dist_logit_scale.reshape(()))
        distill = self._distill_loss(student, teacher)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill

    def _distill_loss(self, student: Side, teacher: Side) -> Tensor:
        group = group_of(self.rank, self.world_size, self.group)
        image, text, scale = student
        if group is not None and not self.gather_with_grad and not self.local_loss:
            image, text = (_ScaleGradient.apply(x, 1 / self.world_size) for x in (image, text))
        from_image, from_text = (
            distill_rows(
                (rows, self._columns(columns, group), scale),
                (teacher_rows, self._columns(teacher_columns, group), teacher[2]),
            )
            for rows, columns, teacher_rows, teacher_columns in (
                (image, text, teacher[0], teacher[1]),
                (text, image, teacher[1], teacher[0]),
            )
        )
        loss = (from_image + from_text).mean() / 2
        return loss if group is None or self.local_loss else all_reduce_sum(loss, group) / self.world_size

    def _columns(self, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """x of all ranks; without its gradient where open_clip has none."""
        if group is None:
            return x
        return all_gather(x.detach() if self.local_loss and not self.gather_with_grad else x, group)


def _check_teacher(image_features: Tensor, image: Tensor, text: Tensor, scale: Tensor) -> None:
    n = image_features.shape[0]
    for name, x in (("dist_image_features", image), ("dist_text_features", text)):
        if x.ndim != 2 or x.shape[0] != n:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, must be ({n}, D) with D the teacher's")
        if x.device != image_features.device:
            raise ValueError(f"{name} is on {x.device}, must be on {image_features.device} as image_features")
    if text.shape != image.shape or text.dtype != image.dtype:
        given, wanted = (f"{x.dtype} {tuple(x.shape)}" for x in (text, image))
        raise ValueError(f"dist_text_features is {given}, must be {wanted} as dist_image_features")
    if not isinstance(scale, Tensor) or scale.numel() != 1:
        raise ValueError(f"dist_logit_scale is {scale!r}, must be a tensor of one element: the exponentiated scale")
