"""open_clip's `DistillClipLoss` over `ClipLoss`, its distillation term in O(N) memory."""

import torch.distributed as dist
from torch import Tensor

from fastclip.distributed import all_gather, all_reduce_sum
from fastclip.losses.clip import ClipLoss, _ScaleGradient
from fastclip.losses.ranks import group_of
from fastclip.ops.distill_loss import distill_rows
from fastclip.ops.distill_loss.op import Side


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
