"""The losses people train with: functions and modules over the operators in `fastclip.ops` and a process group."""

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.distributed import all_gather, all_reduce_sum, check_equal_rows, merge_log_sum
from fastclip.ops.contrastive_loss import contrastive_block

Directions = Literal["both", "image", "text"]
Reduction = Literal["mean", "sum", "none"]

_EXACT_SOFTPLUS = 40.0  # beyond, softplus(x) - x < 5e-18: x itself, in fp64 too


class ContrastiveStats(NamedTuple):
    """What a batch says beside its loss, for this rank's n pairs; detached."""

    row_lse: Tensor  # (n,) log-sum-exp of image i's logits over all texts
    col_lse: Tensor  # (n,) log-sum-exp of text i's logits over all images
    hits: Tensor  # (2, n) bool: no other text beats image i's own; no other image beats text i's own


@overload
def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    directions: Directions = ...,
    normalize: bool = ...,
    reduction: Reduction = ...,
    group: dist.ProcessGroup | None = ...,
    return_stats: Literal[False] = ...,
    check_values: bool = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    directions: Directions = ...,
    normalize: bool = ...,
    reduction: Reduction = ...,
    group: dist.ProcessGroup | None = ...,
    return_stats: Literal[True],
    check_values: bool = ...,
    impl: str = ...,
) -> tuple[Tensor, ContrastiveStats]: ...


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    directions: Directions = "both",
    normalize: bool = False,
    reduction: Reduction = "mean",
    group: dist.ProcessGroup | None = None,
    return_stats: bool = False,
    check_values: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """CLIP's symmetric contrastive loss (Radford et al. 2021, arXiv 2103.00020) in O(N) memory, in nats.

    With z_ij = logit_scale * image_i . text_j over the N pairs of the whole group:

        image_i = log sum_j exp(z_ij) - z_ii    text_i = log sum_j exp(z_ji) - z_ii    both_i = (image_i + text_i) / 2

    Across ranks (`group`) each rank brings its n pairs, the same n on each; only the text features travel. "mean" and
    "sum" are over all N pairs and the same on every rank. The gradient is that of the SUM over ranks of the returned
    values: for "mean" the local features get W * dL/dx, and the scale's gradient averages to dL/ds, so the averaging
    over ranks that DDP and DeepSpeed do gives exactly the gradient of the full batch.

    Args:
        image_features: (n, D), L2-normalised unless `normalize`; fp32, bf16, fp16 or fp64.
        text_features: (n, D), same dtype and device.
        logit_scale: the exponentiated scale, 0-dim or (1,).
        directions: which of the sums above: "both" is their mean.
        normalize: L2-normalise the features first.
        reduction: "mean", "sum", or "none" for this rank's (n,) losses.
        group: process group, None for this process alone.
        return_stats: also return `ContrastiveStats`.
        check_values: verify that the inputs are finite and, across ranks on a GPU, of equal length; costs a
            synchronisation. (On the CPU the lengths are always compared.)
        impl: "auto", "reference", "dense", "cpu" or "triton"; one that cannot run raises.

    Returns:
        The loss in fp32 (fp64 for fp64 features), or (loss, ContrastiveStats).

    Raises:
        ValueError: shapes, dtypes or options that do not fit, naming the argument.
    """
    _check_inputs(image_features, text_features, logit_scale, directions, reduction, check_values)
    if normalize:
        image_features, text_features = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
    scale, n = logit_scale.reshape(()), image_features.shape[0]
    world_size, offset, all_text = 1, 0, text_features
    if group is not None:
        if check_values or image_features.device.type == "cpu":
            check_equal_rows("image_features", image_features, group)
        world_size, offset = dist.get_world_size(group), dist.get_rank(group) * n
        all_text = all_gather(text_features, group)

    positive, row_max, row_log_sum, col_max, col_log_sum = contrastive_block(
        image_features, all_text, scale, offset, impl
    )
    if group is not None:
        col_max, col_log_sum = merge_log_sum(col_max, col_log_sum, group)
    row_loss = _loss_of(positive, row_max, row_log_sum)
    col_loss = _loss_of(positive, col_max, col_log_sum)
    loss = {"both": (row_loss + col_loss) / 2, "image": row_loss, "text": col_loss}[directions]
    if reduction != "none":
        loss = loss.sum() if group is None else all_reduce_sum(loss.sum(), group)
        loss = loss / (n * world_size) if reduction == "mean" else loss
    if not return_stats:
        return loss
    with torch.no_grad():
        row_lse = torch.logaddexp(row_max + row_log_sum, positive)
        col_lse = torch.logaddexp(col_max + col_log_sum, positive)
        return loss, ContrastiveStats(row_lse, col_lse, torch.stack((positive >= row_max, positive >= col_max)))


def _loss_of(positive: Tensor, highest: Tensor, log_sum: Tensor) -> Tensor:
    """log(1 + sum_negatives exp(z - z_positive)), with the negatives' log-sum-exp as highest + log_sum."""
    return F.softplus((highest - positive) + log_sum, threshold=_EXACT_SOFTPLUS)


def _check_inputs(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    directions: str,
    reduction: str,
    check_values: bool,
) -> None:
    image, text = image_features, text_features
    if image.ndim != 2 or 0 in image.shape:
        raise ValueError(f"image_features has shape {tuple(image.shape)}, must be (N, D) with N and D at least 1")
    if text.shape != image.shape:
        raise ValueError(f"text_features has shape {tuple(text.shape)}, must be {tuple(image.shape)} as image_features")
    if not image.is_floating_point():
        raise ValueError(f"image_features is {image.dtype}, must be a floating-point type")
    if text.dtype != image.dtype or text.device != image.device:
        given, wanted = (f"{x.dtype} on {x.device}" for x in (text, image))
        raise ValueError(f"text_features is {given}, must be {wanted} as image_features")
    if not isinstance(logit_scale, Tensor) or logit_scale.numel() != 1 or logit_scale.ndim > 1:
        given = (
            f"a tensor of shape {tuple(logit_scale.shape)}" if isinstance(logit_scale, Tensor) else repr(logit_scale)
        )
        raise ValueError(f"logit_scale is {given}, must be a tensor of shape () or (1,): the exponentiated scale")
    if directions not in ("both", "image", "text"):
        raise ValueError(f"directions is {directions!r}, must be 'both', 'image' or 'text'")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, must be 'mean', 'sum' or 'none'")
    if check_values:
        for name, x in (("image_features", image), ("text_features", text), ("logit_scale", logit_scale)):
            if not torch.isfinite(x).all():
                raise ValueError(f"{name} has values that are not finite, must be all finite")


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
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, must be at least 0 and below world_size, which is {world_size}")
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
        group = None if self.world_size == 1 else self._group()
        if group is not None and not self.gather_with_grad:
            if self.local_loss:
                return self._local_loss(image_features, text_features, logit_scale, group)
            image_features, text_features = (
                _ScaleGradient.apply(x, 1 / self.world_size) for x in (image_features, text_features)
            )
        reduction: Reduction = "none" if self.local_loss else "mean"
        loss = contrastive_loss(
            image_features, text_features, logit_scale, reduction=reduction, group=group, impl=self.impl
        )
        return loss.mean()

    def _local_loss(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        image_to_text = self._row_loss(image_features, all_gather(text_features.detach(), group), logit_scale)
        text_to_image = self._row_loss(text_features, all_gather(image_features.detach(), group), logit_scale)
        return (image_to_text + text_to_image) / 2

    def _row_loss(self, rows: Tensor, columns: Tensor, logit_scale: Tensor) -> Tensor:
        offset = self.rank * rows.shape[0]
        positive, row_max, row_log_sum, *_ = contrastive_block(
            rows, columns, logit_scale.reshape(()), offset, self.impl
        )
        return _loss_of(positive, row_max, row_log_sum).mean()

    def _group(self) -> dist.ProcessGroup:
        group = self.group or dist.group.WORLD
        if group is None:
            raise ValueError(f"world_size is {self.world_size}, must be 1 before torch.distributed.init_process_group")
        found = (dist.get_rank(group), dist.get_world_size(group))
        if found != (self.rank, self.world_size):
            raise ValueError(
                f"rank, world_size are {(self.rank, self.world_size)}, must be those of the group: {found}"
            )
        return group
