"""open_clip's `CoCaLoss` over `ClipLoss`, and the caption loss of a whole batch over ranks."""

import torch.distributed as dist
from torch import Tensor, nn

from fastclip.distributed import all_reduce_sum, sum_over_ranks
from fastclip.losses.clip import ClipLoss


def caption_loss(
    caption_losses: Tensor,  # (n,)
    caption_tokens: Tensor,  # (n,)
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The mean over all tokens of all captions of the group of -log p(token), in nats (Yu et al. 2022).

    caption_losses, caption_tokens: of this rank's captions the sum over their tokens, and how many those are, as a CLIP
    with a decoder returns them. The value is the same on every rank; its gradient that of the sum of the ranks' values,
    as `contrastive_loss` has it, so that averaging over ranks gives exactly the full batch's. (open_clip's `CoCaLoss`
    is each rank's own mean.)
    """
    total, count = caption_losses.sum(), caption_tokens.sum().detach()
    if group is not None:
        total, count = all_reduce_sum(total, group), sum_over_ranks(count, group)
    return total / count.clamp(min=1)


class CoCaLoss(ClipLoss):
    """open_clip's `CoCaLoss` (Yu et al. 2022, arXiv 2205.01917): contrastive loss in O(N) memory, and caption loss.

    Args:
        caption_loss_weight: factor of the captions' cross-entropy.
        clip_loss_weight: factor of the contrastive loss; 0 leaves it out.
        pad_id: the token whose places in `labels` do not count.
        local_loss, gather_with_grad, cache_labels, rank, world_size, impl, group: as `ClipLoss`.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        impl: str = "auto",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, impl=impl, group=group)
        self.caption_loss_weight = caption_loss_weight
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]  # open_clip's call: captions come before the scale
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive loss, caption loss), each times its weight, or {"contrastive_loss", "caption_loss"}.

        Args:
            image_features, text_features: (n, D) normalised.
            logits: (n, L, V), of every next token.
            labels: (n, L) int64, the tokens.
            logit_scale: the exponentiated scale.
        """
        if logits.ndim != 3:
            raise ValueError(f"logits has shape {tuple(logits.shape)}, must be (n, L, V)")
        if labels.shape != logits.shape[:2]:
            wanted = f"{tuple(logits.shape[:2])} as logits"
            raise ValueError(f"labels has shape {tuple(labels.shape)}, must be {wanted}")
        clip_loss = logits.new_zeros(())
        if self.clip_loss_weight:
            loss = super().forward(image_features, text_features, logit_scale)
            assert isinstance(loss, Tensor)
            clip_loss = self.clip_loss_weight * loss
        caption_loss = self.caption_loss_weight * self.caption_loss(logits.transpose(1, 2), labels)
        if output_dict:
            return {"contrastive_loss": clip_loss, "caption_loss": caption_loss}
        return clip_loss, caption_loss
