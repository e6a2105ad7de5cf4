"""`contrastive_loss`: CLIP's loss and its relatives over the operators of `fastclip.ops` and a process group."""

from functools import partial
from typing import Literal, NamedTuple, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastclip.distributed import Layout, all_reduce_sum, gather_rows
from fastclip.losses.checks import agreed_layout, check_contrastive
from fastclip.losses.small import is_made_at_once
from fastclip.losses.terms import Pairing, Terms, contrastive_terms
from fastclip.ops.contrastive_loss import measured
from fastclip.ops.contrastive_loss.at_once import contrastive_mean_at_once
from fastclip.ops.contrastive_loss.sums import group_size

Directions = Literal["both", "image", "text"]
Reduction = Literal["mean", "sum", "none"]
GroupMode = Literal["positive", "ignore"]
GroupIds = Tensor | tuple[Tensor, Tensor]

_EXACT_SOFTPLUS = 40.0  # beyond, softplus(x) - x < 5e-18: x itself, in fp64 too


class ContrastiveStats(NamedTuple):
    """What a batch says beside its loss, for this rank's n pairs; detached."""

    row_lse: Tensor  # (n,) log-sum-exp of image i's logits over its denominator
    col_lse: Tensor  # (n,) log-sum-exp of its text's logits over its denominator
    hits: Tensor  # (2, n) bool: no other text there beats image i's own; no other image beats its text's own


@overload
def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    labels: Tensor | None = ...,
    group_ids: GroupIds | None = ...,
    group_mode: GroupMode = ...,
    weights: Tensor | None = ...,
    label_smoothing: float = ...,
    directions: Directions = ...,
    normalize: bool = ...,
    reduction: Reduction = ...,
    memory_budget: int = ...,
    group: dist.ProcessGroup | None = ...,
    ring: bool = ...,
    uneven: bool = ...,
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
    labels: Tensor | None = ...,
    group_ids: GroupIds | None = ...,
    group_mode: GroupMode = ...,
    weights: Tensor | None = ...,
    label_smoothing: float = ...,
    directions: Directions = ...,
    normalize: bool = ...,
    reduction: Reduction = ...,
    memory_budget: int = ...,
    group: dist.ProcessGroup | None = ...,
    ring: bool = ...,
    uneven: bool = ...,
    return_stats: Literal[True],
    check_values: bool = ...,
    impl: str = ...,
) -> tuple[Tensor, ContrastiveStats]: ...


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    labels: Tensor | None = None,
    group_ids: GroupIds | None = None,
    group_mode: GroupMode = "positive",
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    directions: Directions = "both",
    normalize: bool = False,
    reduction: Reduction = "mean",
    memory_budget: int = 0,
    group: dist.ProcessGroup | None = None,
    ring: bool = False,
    uneven: bool = False,
    return_stats: bool = False,
    check_values: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """CLIP's symmetric contrastive loss (Radford et al. 2021, arXiv 2103.00020) in O(N) memory, in nats.

    With z_ij = logit_scale * image_i . text_j over the N images and M texts of the whole group, and l_i the text of
    image i:

        image_i = log sum_{j in R_i} exp(z_ij) - sum_j q_ij z_ij        j are texts, R_i image i's denominator
        text_i = log sum_{k in C_i} exp(z_kl) - sum_k r_ik z_kl         k are images, C_i its text's, l = l_i
        both_i = (image_i + text_i) / 2

    Without options R_i is all texts and C_i all images, and all weight is on the pair: q_ij = 1 for j = l_i, r_ik = 1
    for k = i. The options change that:

        group_mode="positive"   q_ij = 1 / (how many texts i's group has) for those, r_ik = 1 / (how many images it has)
                                for those: the mean over positives outside the log (SupCon's L_out, arXiv 2004.11362;
                                UniCL, 2204.03610)
        group_mode="ignore"     R_i and C_i without the others of i's group: they are neither positive nor negative
        label_smoothing=e       (1 - e) q_ij + e / M and (1 - e) r_ik + e / N, as in `F.cross_entropy`; with positive
                                groups too, over all columns, which all are in the denominator

    A text that is nobody's is a negative of the images and has no text_i.

        "none": w_i loss_i      "sum": sum_i w_i loss_i      "mean": sum_i w_i loss_i / sum_i w_i

    with w = 1 without weights, as `F.cross_entropy` does with its weights; all weights 0 make "mean" NaN.

    Across ranks (`group`) each rank brings its own n pairs and m texts; only the text features travel, in their own
    type, and their gradients home in fp32. "mean" and "sum" are over all pairs and the same on every rank. The gradient
    is that of the SUM over ranks of the returned values: for "mean" the local features get W * dL/dx, and the scale's
    gradient averages to dL/ds, so the averaging over ranks that DDP and DeepSpeed do gives exactly the gradient of the
    full batch. Differentiable once.

    Args:
        image_features: (n, D), L2-normalised unless `normalize`; fp32, bf16, fp16 or fp64.
        text_features: (m, D), m >= n, same dtype and device.
        logit_scale: the exponentiated scale, 0-dim or (1,), above 0.
        labels: (n,) int64, distinct: the text of each image, counted in this rank's texts. None: text i for image i.
        group_ids: int64, equal numbers for what belongs together, over all ranks: (n,) for n pairs without labels, or
            a pair (of the images (n,), of the texts (m,)) in which every image has the number of its own text.
        group_mode: what the others of a group are, as above.
        weights: (n,) of the pairs, at least 0, floating-point; differentiable.
        label_smoothing: in [0, 1); 0 with group_mode="ignore", where "all columns" has no meaning.
        directions: which of the sums above: "both" is their mean.
        normalize: L2-normalise the features first, in fp32: their unit vectors are used as fp16 where 16-bit features
            are on a GPU. A vector shorter than 1e-12 counts as zero and gets a zero gradient.
        reduction: "mean", "sum", or "none" for this rank's (n,) losses.
        memory_budget: bytes that may hold fp32 logits from forward to backward, for as many whole rows as fit: those
            are not made a second time, three products instead of four. On the CPU 4 MB are used in any case, and no
            more with 16-bit features, whose products are faster there than the memory.
        group: process group, None for this process alone.
        ring: pass the texts round the ranks instead of gathering them: O(m D) memory in place of O(M D), W messages
            in place of one; the same loss and gradient up to rounding.
        uneven: the ranks may bring different numbers of pairs or texts; on a GPU this costs a synchronisation, and
            without it all are taken to bring as many as this one. (On the CPU the numbers are always told.)
        return_stats: also return `ContrastiveStats`.
        check_values: verify that the inputs are finite and their values as said above, also on a GPU, where it costs a
            synchronisation. Values that no check has seen, on a GPU or in a compiled graph, make the loss NaN where
            they are wrong; NaN and infinite features always make it NaN.
        impl: "auto", "reference", "dense", "cpu", "triton" or "cuda"; one that cannot run raises.

    Returns:
        The loss in fp32 (fp64 for fp64 features), or (loss, ContrastiveStats).

    Raises:
        ValueError: shapes, types, values or options that do not fit, naming the argument. Where the ranks tell each
            other their numbers, an error on one is raised on all.
    """
    check = partial(
        check_contrastive, image_features, text_features, logit_scale, labels, group_ids, group_mode, weights,
        label_smoothing, directions, reduction, memory_budget, group, ring, check_values,
    )  # fmt: skip
    layout, faults = agreed_layout(check, image_features, text_features, group, uneven or check_values)
    is_plain = all(x is None for x in (labels, group_ids, weights, group)) and not (label_smoothing or normalize)
    is_plain = is_plain and (directions, reduction, return_stats) == ("both", "mean", False)
    if is_plain and is_made_at_once(image_features, text_features, logit_scale, impl, measured):
        return contrastive_mean_at_once(image_features, text_features, logit_scale.reshape(()))
    image_ids, text_ids = _halves(group_ids)
    pairing = Pairing(labels, image_ids, text_ids, image_ids is not None and group_mode == "ignore", layout)
    has_positives = image_ids is not None and group_mode == "positive"
    sums = ((True,) if has_positives else ()) + ((False,) if label_smoothing > 0 else ())

    terms = contrastive_terms(
        image_features, text_features, logit_scale.reshape(()), pairing, sums, normalize, ring, memory_budget, impl
    )
    image_loss, text_loss = _losses(terms, pairing, sums, label_smoothing)
    loss = {"both": (image_loss + text_loss) / 2, "image": image_loss, "text": text_loss}[directions]
    for is_so in faults.values():
        loss = loss * torch.where(is_so, torch.nan, 1.0)
    loss = _reduced(loss, weights, reduction, layout)
    return (loss, _stats(terms)) if return_stats else loss


def loss_of(positive: Tensor, highest: Tensor, log_sum: Tensor) -> Tensor:
    """log(1 + sum_negatives exp(z - z_positive)), with the negatives' log-sum-exp as highest + log_sum.

    An infinite positive, from an infinite feature, is NaN as it is in a log-sum-exp, not a loss of 0.
    """
    return F.softplus((highest - positive) + log_sum, threshold=_EXACT_SOFTPLUS) + 0 * positive


def _halves(group_ids: GroupIds | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The ids of the images and of the texts."""
    if group_ids is None:
        return None, None
    if isinstance(group_ids, Tensor):
        return group_ids, group_ids.view_as(group_ids)  # another tensor: dynamo takes each argument once
    image_ids, text_ids = group_ids
    return image_ids, text_ids


def _losses(terms: Terms, pairing: Pairing, sums: tuple[bool, ...], label_smoothing: float) -> tuple[Tensor, Tensor]:
    """image_i and text_i, (n,) each.

    Both are softplus(lse of the negatives - z_p) and z_p - sum_j q_ij z_ij, which is nothing where the positive p is
    the only one: so a converged pair stays exact. The second is linear in the logits.
    """
    image_loss = loss_of(terms.positive, terms.row_max, terms.row_log_sum)
    text_loss = loss_of(terms.positive, terms.col_max, terms.col_log_sum)
    for over_group, row_sum, col_sum in zip(sums, terms.row_sums, terms.col_sums, strict=True):
        if over_group:
            in_row, in_col = _group_sizes(pairing)
            row_rest = torch.where(in_row > 1, terms.positive - row_sum / in_row, 0)
            col_rest = torch.where(in_col > 1, terms.positive - col_sum / in_col, 0)
            share = 1 - label_smoothing
        else:
            row_rest = terms.positive - row_sum / sum(pairing.layout.texts)
            col_rest = terms.positive - col_sum / sum(pairing.layout.images)
            share = label_smoothing
        image_loss, text_loss = image_loss + share * row_rest, text_loss + share * col_rest
    return image_loss, text_loss


def _group_sizes(pairing: Pairing) -> tuple[Tensor, Tensor]:
    """(n,) each: how many texts image i's group has over all ranks, and how many images."""
    image_ids, text_ids, layout = pairing.image_ids, pairing.text_ids, pairing.layout
    assert image_ids is not None
    assert text_ids is not None
    all_texts, all_images = text_ids, image_ids
    if layout.group is not None:
        all_texts = gather_rows(text_ids, layout.texts, layout.group)
        all_images = gather_rows(image_ids, layout.images, layout.group)
    return group_size(all_texts, image_ids), group_size(all_images, image_ids)


def _reduced(loss: Tensor, weights: Tensor | None, reduction: Reduction, layout: Layout) -> Tensor:
    if weights is not None:
        weights = weights.to(loss.dtype)
        loss = loss * weights
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "mean" and weights is not None:
        both = torch.stack((total, weights.sum()))
        total, divisor = both if layout.group is None else all_reduce_sum(both, layout.group)
        return total / divisor
    total = total if layout.group is None else all_reduce_sum(total, layout.group)
    return total / sum(layout.images) if reduction == "mean" else total


@torch.no_grad()
def _stats(terms: Terms) -> ContrastiveStats:
    row_lse = torch.logaddexp(terms.row_max + terms.row_log_sum, terms.positive)
    col_lse = torch.logaddexp(terms.col_max + terms.col_log_sum, terms.positive)
    hits = torch.stack((terms.positive >= terms.row_max, terms.positive >= terms.col_max))
    return ContrastiveStats(row_lse, col_lse, hits)
