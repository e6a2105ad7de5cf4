"""sentence-transformers' in-batch negatives losses in linear memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.interop.drop_in import DropIn, Replacement, as_in_a_product, left_alone, library
from fastclip.losses import contrastive_loss

_PAIRS, _SYMMETRIC = {"query_to_doc"}, {"query_to_doc", "doc_to_query"}


def sentence_transformers_losses(impl: str = "auto") -> DropIn:
    """A drop-in for `MultipleNegativesRankingLoss`, its `Cached` form, and what builds on them: same value and
    gradients, and no score matrix.

    With q the queries, d the documents (every query's own first, then the hard negatives), s the scale:

        loss = 1 / n sum_i [ log sum_j exp(s cos(q_i, d_j)) - s cos(q_i, d_i) ]

    and, with both directions "per_direction", the mean of that and the same over the queries of each document. Across
    devices (`gather_across_devices`) only the documents travel. Other similarities than `cos_sim` and `dot_score`,
    "query_to_query", "doc_to_doc", two directions in a joint softmax, and hardness run the library's code, with a
    warning. In the cached loss only the loss itself is replaced, not the two passes.

    Args:
        impl: as `contrastive_loss`.
    """

    def find() -> list[Replacement]:
        losses = library("sentence_transformers", "sentence-transformers", "sentence_transformer.losses")
        return [
            Replacement(losses.MultipleNegativesRankingLoss, "compute_loss_from_embeddings", _plain(impl)),
            Replacement(losses.CachedMultipleNegativesRankingLoss, "calculate_loss", _cached(impl)),
        ]

    return DropIn("sentence_transformers_losses", find)


def _plain(impl: str) -> Callable[[Any], Any]:
    def make(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def compute_loss_from_embeddings(self: Any, embeddings: list[Tensor], labels: Tensor) -> Tensor:
            reason = _why_not(self, embeddings)
            if reason:
                left_alone(type(self).__name__, reason)
                return theirs(self, embeddings, labels)
            return _loss(self, embeddings, impl)

        return compute_loss_from_embeddings

    return make


def _cached(impl: str) -> Callable[[Any], Any]:
    def make(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def calculate_loss(
            self: Any, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
        ) -> Tensor:
            reason = _why_not(self, reps)
            if reason:
                left_alone(type(self).__name__, reason)
                return theirs(self, reps, labels, with_backward=with_backward)
            loss = _loss(self, [torch.cat(parts) for parts in reps], impl).to(reps[0][0].dtype)  # as the library's own
            if with_backward:
                loss.backward()
                loss = loss.detach()
            return loss

        return calculate_loss

    return make


def _why_not(loss: Any, columns: Sequence[Any]) -> str | None:
    """Why these options have no linear-memory form here, or None."""
    from sentence_transformers.util import cos_sim, dot_score

    directions = set(loss.directions)
    if len(columns) < 2:
        return "it has fewer than two columns"
    if loss.similarity_fct not in (cos_sim, dot_score):
        return f"similarity_fct is {getattr(loss.similarity_fct, '__name__', loss.similarity_fct)}"
    if directions not in (_PAIRS, _SYMMETRIC):
        return f"directions are {', '.join(loss.directions)}"
    if directions == _SYMMETRIC and loss.partition_mode != "per_direction":
        return f"two directions share one softmax (partition_mode={loss.partition_mode!r})"
    if loss.hardness_mode is not None and loss.hardness_strength > 0:
        return f"hardness_mode is {loss.hardness_mode!r}"
    return None


def _loss(loss: Any, columns: Sequence[Tensor], impl: str) -> Tensor:
    from sentence_transformers.util import cos_sim

    queries, *documents = as_in_a_product(*columns)
    is_spread = loss.gather_across_devices and dist.is_available() and dist.is_initialized()
    losses = contrastive_loss(
        queries,
        torch.cat(documents),
        torch.tensor(float(loss.scale), device=queries.device, dtype=torch.float32),
        labels=torch.arange(len(queries), device=queries.device),
        directions="both" if set(loss.directions) == _SYMMETRIC else "image",
        normalize=loss.similarity_fct is cos_sim,
        reduction="none",
        group=dist.group.WORLD if is_spread else None,
        impl=impl,
    )
    return losses.mean()
