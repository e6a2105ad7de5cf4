"""open_clip's `ClipLoss` over `contrastive_loss`."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastclip.distributed import all_gather, check_equal_rows
from fastclip.losses.contrastive import Reduction, contrastive_loss, loss_of
from fastclip.losses.ranks import check_ranks, group_of
from fastclip.ops.contrastive_loss import contrastive_block


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        return d_x * ctx.factor, None


class ClipLoss(nn.Module):
    """open_clip's `ClipLoss`, same arguments and meaning, in O(N) memory.

    Args:
        local_loss: the value is the mean over this rank's pairs, not over all pairs.
        gather_with_grad: gradients flow to the features of the other ranks (summed over ranks: W * dL/dx, which DDP's
            averaging turns into the exact gradient). Without, only this rank's own use of its features counts: dL/dx
            with `local_loss=False`.
        cache_labels: accepted for open_clip's sake; there are no labels to cache.
        rank: this process in the group.
        world_size: number of processes; 1 ignores `group`.
        impl: as `contrastive_loss`.
        group: process group; None is the default group.

    The scale's gradient may be spread differently over the ranks than open_clip's; its mean over ranks is the same.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        impl: str = "auto",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_ranks(rank, world_size)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.impl = impl
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss}. Features (n, D) normalised, logit_scale exponentiated; softmax
        ignores a bias."""
        loss = self._loss(image_features, text_features, logit_scale)
        if logit_bias is not None:
            loss = loss + 0 * logit_bias.sum()  # its gradient is zero, and DDP must see it used
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        group = group_of(self.rank, self.world_size, self.group)
        if group is not None and not self.gather_with_grad:
            if self.local_loss:
                return self._local_loss(image_features, text_features, logit_scale, group)
            image_features, text_features = (
                _ScaleGradient.apply(x, 1 / self.world_size) for x in (image_features, text_features)
            )
        reduction: Reduction = "none" if self.local_loss and group is not None else "mean"
        loss = contrastive_loss(
            image_features, text_features, logit_scale, reduction=reduction, group=group, impl=self.impl
        )
        return loss.mean() if reduction == "none" else loss

    def _local_loss(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        if image_features.device.type == "cpu":
            check_equal_rows("image_features", image_features, group)
        image_to_text = self._row_loss(image_features, all_gather(text_features.detach(), group), logit_scale)
        text_to_image = self._row_loss(text_features, all_gather(image_features.detach(), group), logit_scale)
        return (image_to_text + text_to_image) / 2

    def _row_loss(self, rows: Tensor, columns: Tensor, logit_scale: Tensor) -> Tensor:
        offset = self.rank * rows.shape[0]
        positive, row_max, row_log_sum, *_ = contrastive_block(
            rows, columns, logit_scale.reshape(()), offset, self.impl
        )
        return loss_of(positive, row_max, row_log_sum).mean()
