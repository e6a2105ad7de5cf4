"""`contrastive_loss`: CLIP's loss over the operator of `fastclip.ops` and a process group."""

from typing import Literal, NamedTuple, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastclip.distributed import all_gather, all_reduce_sum, check_equal_rows, merge_log_sum
from fastclip.losses.checks import check_inputs
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
    check_inputs(image_features, text_features, logit_scale, directions, reduction, check_values)
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
    row_loss = loss_of(positive, row_max, row_log_sum)
    col_loss = loss_of(positive, col_max, col_log_sum)
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


def loss_of(positive: Tensor, highest: Tensor, log_sum: Tensor) -> Tensor:
    """log(1 + sum_negatives exp(z - z_positive)), with the negatives' log-sum-exp as highest + log_sum."""
    return F.softplus((highest - positive) + log_sum, threshold=_EXACT_SOFTPLUS)
