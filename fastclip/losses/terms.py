"""What a contrastive loss needs to know of its logits, across ranks, as one differentiable function.

One function from the features to O(n) numbers: so that the gradient of the features stays in fp32 until the ranks are
summed, the normalisation is undone and it is rounded once.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastclip.distributed import Layout
from fastclip.losses import gathered, ring, small
from fastclip.losses.blocks import Problem
from fastclip.ops._rows import inner_product, scaled, scaled_and_inner
from fastclip.ops.contrastive_loss.reference import accumulation_dtype

SMALLEST_NORM = 1e-12  # F.normalize's: what is shorter counts as the zero vector


class Terms(NamedTuple):
    """Of this rank's n pairs, (n,) each; z_ij are the logits of all ranks' images and texts, row i an image."""

    positive: Tensor
    row_max: Tensor  # of the negatives; a constant to autograd
    row_log_sum: Tensor  # their log-sum-exp less row_max
    col_max: Tensor
    col_log_sum: Tensor
    row_sums: tuple[Tensor, ...]  # sum_j z_ij over the group, over all: those that were asked for
    col_sums: tuple[Tensor, ...]


class Pairing(NamedTuple):
    """Which text belongs to which image."""

    labels: Tensor | None  # (n,)
    image_ids: Tensor | None  # (n,)
    text_ids: Tensor | None  # (m,)
    ignores: bool  # the rest of a group is neither positive nor negative
    layout: Layout


def contrastive_terms(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    pairing: Pairing,
    sums: tuple[bool, ...],
    normalize: bool,
    uses_ring: bool,
    memory_budget: int,
    impl: str,
) -> Terms:
    """The terms of image_features (n, D) and text_features (m, D); sums: over the group (True), over all (False)."""
    uses_ring = uses_ring and len(pairing.layout.texts) > 1
    kept_rows = 0
    if small.has_gradient(image_features, text_features, scale) and not uses_ring:
        if image_features.device.type == "cpu":  # whose 16-bit products cost less than fetching logits from memory
            memory_budget = max(memory_budget * (image_features.dtype.itemsize > 2), small.IN_CACHE)
        row_bytes = sum(pairing.layout.texts) * accumulation_dtype(image_features.dtype).itemsize
        kept_rows = min(image_features.shape[0], memory_budget // row_bytes)
    options = (sums, normalize, uses_ring, kept_rows, impl)
    outputs = _Terms.apply(image_features, text_features, scale, *pairing, *options)
    positive, row_max, row_log_sum, *row_sums = outputs[: 3 + len(sums)]
    col_max, col_log_sum, *col_sums = outputs[3 + len(sums) :]
    return Terms(positive, row_max, row_log_sum, col_max, col_log_sum, tuple(row_sums), tuple(col_sums))


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        scale: Tensor,
        labels: Tensor | None,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        ignores: bool,
        layout: Layout,
        sums: tuple[bool, ...],
        normalize: bool,
        uses_ring: bool,
        kept_rows: int,
        impl: str,
    ) -> tuple[Tensor, ...]:
        ctx.strategy = ring if uses_ring else gathered
        ctx.constants = (layout, ignores, sums, kept_rows, impl)
        norms = [_reciprocal_norm(x) if normalize else None for x in (image_features, text_features)]
        image, text = (_unit(x, r) for x, r in zip((image_features, text_features), norms, strict=True))
        problem = Problem(image, text, scale, labels, image_ids, text_ids, *ctx.constants)
        rows, columns, kept = ctx.strategy.statistics(problem)
        columns = [_of_pairs(x, labels, image.shape[0]) for x in columns]
        ctx.save_for_backward(
            image_features, text_features, scale, *norms, labels, image_ids, text_ids, rows[1], rows[2], *kept
        )
        ctx.mark_non_differentiable(rows[1], columns[0])
        return *rows, *columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        image_features, text_features, scale, image_norm, text_norm, *pairing = ctx.saved_tensors[:8]
        row_max, row_log_sum, *kept = ctx.saved_tensors[8:]
        k = len(ctx.constants[2])
        image, text = _unit(image_features, image_norm), _unit(text_features, text_norm)
        problem = Problem(image, text, scale, *pairing, *ctx.constants)
        d_positive, _, *d_rows = d_outputs[: 3 + k]
        d_columns = [_to_texts(x, problem.labels, text.shape[0]) for x in d_outputs[4 + k :]]
        grad_image, grad_text = ctx.strategy.gradients(
            problem, kept, (row_max, row_log_sum), d_positive, d_rows, d_columns
        )
        factor = scale.to(grad_image.dtype)
        d_image, d_scale = _d_features(grad_image, factor, image_features, image, image_norm, True)
        d_text, _ = _d_features(grad_text, factor, text_features, text, text_norm, False)
        assert d_scale is not None
        return d_image, d_text, d_scale.to(scale.dtype), *(None,) * 10


def _of_pairs(x: Tensor, labels: Tensor | None, n: int) -> Tensor:
    """Of x (m,), one for each text, what belongs to the n images."""
    return x[:n] if labels is None else x[labels.clamp(0, x.shape[0] - 1)]


def _to_texts(x: Tensor, labels: Tensor | None, m: int) -> Tensor:
    """The other way: zero for texts that are nobody's."""
    if labels is None:
        return F.pad(x, (0, m - x.shape[0]))
    return x.new_zeros(m).index_copy_(0, labels.clamp(0, m - 1), x)


def _reciprocal_norm(x: Tensor) -> Tensor:
    """1 / |x_i| in the accumulation dtype; 0 for what counts as the zero vector."""
    norm = torch.linalg.vector_norm(x, dim=1, dtype=accumulation_dtype(x.dtype))
    return torch.where(norm < SMALLEST_NORM, 0, norm.reciprocal())


def _unit(x: Tensor, reciprocal_norm: Tensor | None) -> Tensor:
    """x normalised and rounded, the same each time; x itself without norms.

    16-bit vectors of unit length lose least as float16, which costs the GPU no more than bfloat16; the CPU's kernels
    widen what they get, so there they stay wide.
    """
    if reciprocal_norm is None:
        return x
    wide = x.to(reciprocal_norm.dtype) * reciprocal_norm[:, None]
    return wide.half() if x.dtype in (torch.float16, torch.bfloat16) and x.device.type != "cpu" else wide


def _d_features(
    grad: Tensor, factor: Tensor, x: Tensor, unit: Tensor, reciprocal_norm: Tensor | None, wants_inner: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient for x, rounded once, from factor * grad for `unit`; where wanted sum_ij dz_ij cos_ij too, which is
    <unit, grad>: no pass over the matrix. May overwrite grad."""
    if reciprocal_norm is None and x.dtype != grad.dtype:
        return scaled_and_inner(grad, unit, factor, x.dtype) if wants_inner else (scaled(grad, factor, x.dtype), None)
    inner = inner_product(unit, grad) if wants_inner else None
    d_unit = grad.mul_(factor)
    if reciprocal_norm is not None:
        wide = unit.to(d_unit.dtype)
        d_unit = (d_unit - wide * (wide * d_unit).sum(1, keepdim=True)) * reciprocal_norm[:, None]
    return d_unit.to(x.dtype), inner
