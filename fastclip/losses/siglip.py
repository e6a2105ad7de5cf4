"""open_clip's `SigLipLoss` over `sigmoid_loss`."""

import torch.distributed as dist
from torch import Tensor, nn

from fastclip.losses.ranks import check_ranks, group_of
from fastclip.losses.sigmoid import sigmoid_loss

_DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(nn.Module):
    """open_clip's `SigLipLoss`, same arguments and meaning, in O(N) memory.

    Args:
        cache_labels: accepted for open_clip's sake; there are no labels to cache.
        rank: this process in the group.
        world_size: number of processes; 1 ignores `group`.
        dist_impl: "bidir", "shift", "reduce" or "gather", open_clip's ways to bring the texts to every rank. They have
            one value and one gradient, so all are one path here: the texts are gathered once.
        chunk_size: accepted for open_clip's sake; no matrix is held, whatever it is.
        impl: as `sigmoid_loss`.
        group: process group; None is the default group.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        impl: str = "auto",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_ranks(rank, world_size)
        if dist_impl is not None and dist_impl not in _DIST_IMPLS:
            raise ValueError(f"dist_impl is {dist_impl!r}, must be None or one of {', '.join(_DIST_IMPLS)}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size
        self.impl = impl
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss}: the sum over this rank's images and all texts, divided by this
        rank's pairs. Features (n, D) normalised, logit_scale exponentiated; a bias of None is zero."""
        bias = logit_scale.new_zeros(()) if logit_bias is None else logit_bias
        group = group_of(self.rank, self.world_size, self.group)
        loss = sigmoid_loss(image_features, text_features, logit_scale, bias, group=group, impl=self.impl)
        return {"contrastive_loss": loss} if output_dict else loss
