"""`sigmoid_loss`: SigLIP's loss over the operator of `fastclip.ops` and a process group."""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastclip.distributed import all_gather, check_equal_rows
from fastclip.losses.checks import check_inputs
from fastclip.losses.small import is_made_at_once
from fastclip.ops._at_once import mean_at_once
from fastclip.ops.sigmoid_loss import measured, sigmoid_rows, sigmoid_sum

Reduction = Literal["mean", "sum", "none"]


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group_ids: Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    group: dist.ProcessGroup | None = None,
    check_values: bool = False,
    impl: str = "auto",
) -> Tensor:
    """SigLIP's pairwise sigmoid loss (Zhai et al. 2023, arXiv 2303.15343) in O(N) memory, in nats.

    With z_ij = logit_scale * image_i . text_j + logit_bias over this rank's n images and the N texts of the whole
    group, and y_ij = +1 for image i's own text (and the texts of its group), -1 for every other:

        loss_i = weights_i sum_j softplus(-y_ij z_ij)        mean = sum_i loss_i / n

    Across ranks (`group`) each rank brings its n pairs, the same n on each; only the text features travel. "mean" and
    "sum" are over this rank's rows, so each rank has its own value, as in open_clip. The gradient is that of the SUM
    over ranks of the returned values: the averaging over ranks that DDP and DeepSpeed do gives exactly the gradient of
    the mean over ranks, which is the loss of the full batch.

    For "mean" and "sum" the gradient is made in the forward pass (three n x N x D products in all) and kept in fp32
    until backward. With "none" each row's incoming gradient is known only then, so the logits are made twice (four).

    Args:
        image_features: (n, D), L2-normalised unless `normalize`; fp32, bf16, fp16 or fp64.
        text_features: (n, D), same dtype and device.
        logit_scale: the exponentiated scale, 0-dim or (1,).
        logit_bias: 0-dim or (1,); SigLIP starts at -10.
        group_ids: (n,) integers: the texts of all pairs with the same number are positives of each other's images.
        weights: (n,) of the rows, floating-point; they do not enter the divisor of "mean".
        normalize: L2-normalise the features first.
        reduction: "mean", "sum", or "none" for this rank's (n,) losses.
        group: process group, None for this process alone.
        check_values: verify that the inputs are finite and, across ranks on a GPU, of equal length; costs a
            synchronisation. (On the CPU the lengths are always compared.)
        impl: "auto", "reference", "dense", "cpu", "triton" or "cuda"; one that cannot run raises.

    Returns:
        The loss in fp32 (fp64 for fp64 features).

    Raises:
        ValueError: shapes, dtypes or options that do not fit, naming the argument.
    """
    check_inputs(image_features, text_features, logit_scale, "both", reduction, check_values)
    _check_bias(logit_bias, check_values)
    _check_rows("group_ids", group_ids, image_features, check_values)
    _check_rows("weights", weights, image_features, check_values)
    is_plain = all(x is None for x in (group_ids, weights, group)) and reduction == "mean" and not normalize
    is_plain = is_plain and image_features.device.type == "cpu"
    if is_plain and is_made_at_once(image_features, text_features, logit_scale, impl, measured):
        scalars = (logit_scale.reshape(()), logit_bias.reshape(()))
        return mean_at_once(torch.ops.fastclip_cpu.sigmoid_loss_mean, image_features, text_features, *scalars)
    if normalize:
        image_features, text_features = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
    n, offset, all_text = image_features.shape[0], 0, text_features
    row_groups = None if group_ids is None else group_ids.long()
    col_groups = row_groups
    if group is not None:
        if check_values or image_features.device.type == "cpu":
            check_equal_rows("image_features", image_features, group)
        offset, all_text = dist.get_rank(group) * n, all_gather(text_features, group)
        col_groups = None if row_groups is None else all_gather(row_groups, group)
    block = (
        image_features,
        all_text,
        logit_scale.reshape(()),
        logit_bias.reshape(()),
        row_groups,
        col_groups,
        offset,
    )
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    if reduction == "none":
        rows = sigmoid_rows(*block, impl)
        return rows if weights is None else rows * weights.to(dtype)
    each = torch.ones_like(image_features[:, 0], dtype=dtype) if weights is None else weights.to(dtype)
    loss = sigmoid_sum(*block, each, impl)
    return loss / n if reduction == "mean" else loss


def _check_bias(logit_bias: Tensor, check_values: bool) -> None:
    if not isinstance(logit_bias, Tensor) or logit_bias.numel() != 1 or logit_bias.ndim > 1:
        given = f"a tensor of shape {tuple(logit_bias.shape)}" if isinstance(logit_bias, Tensor) else repr(logit_bias)
        raise ValueError(f"logit_bias is {given}, must be a tensor of shape () or (1,)")
    if check_values and not torch.isfinite(logit_bias).all():
        raise ValueError("logit_bias has values that are not finite, must be all finite")


def _check_rows(name: str, x: Tensor | None, image_features: Tensor, check_values: bool) -> None:
    if x is None:
        return
    if x.shape != image_features.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, must be ({image_features.shape[0]},): one for each image")
    if x.device != image_features.device:
        raise ValueError(f"{name} is on {x.device}, must be on {image_features.device} as image_features")
    if name == "weights" and not x.is_floating_point():
        raise ValueError(f"weights is {x.dtype}, must be a floating-point type")
    if name == "group_ids" and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        raise ValueError(f"group_ids is {x.dtype}, must be an integer type")
    if check_values and not torch.isfinite(x).all():
        raise ValueError(f"{name} has values that are not finite, must be all finite")
