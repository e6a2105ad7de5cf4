"""Image <-> text retrieval with any number of captions an image, in memory that grows with the queries alone."""

from __future__ import annotations

import torch
from torch import Tensor

RECALLS = (1, 5, 10)
_BLOCK = 1 << 24  # scores held at once


def retrieval(image_features: Tensor, text_features: Tensor, caption_image: Tensor) -> dict[str, dict[str, float]]:
    """R@1, R@5, R@10 and the median rank, both ways: {"image_to_text": {...}, "text_to_image": {...}}.

    As in the CLIP paper: R@k is the share of queries with a true partner among their k best; an image has all its
    captions as partners, a caption its one image. The median rank counts from 1.

    Args:
        image_features: (N, D) of unit length.
        text_features: (M, D) of unit length.
        caption_image: (M,) int64, the image of each caption.
    """
    if len(caption_image) != len(text_features):
        raise ValueError(f"caption_image has {len(caption_image)} entries, must have {len(text_features)}, one a text")
    images = torch.arange(len(image_features))
    return {
        "image_to_text": _recalls(ranks(image_features, text_features, images, caption_image)),
        "text_to_image": _recalls(ranks(text_features, image_features, caption_image, images)),
    }


def ranks(queries: Tensor, items: Tensor, query_group: Tensor, item_group: Tensor) -> Tensor:
    """How many items of another group score at least as high as the query's best partner: int64 (Q,), 0 is a hit.

    Ties count against the query, so that features that are all alike find nothing. A query without a partner has rank
    len(items). Scores are computed in blocks of queries, never as a whole.
    """
    found = torch.full((len(queries),), len(items))
    rows = max(1, _BLOCK // max(1, len(items)))
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows] @ items.T
        partners = query_group[start : start + rows, None] == item_group
        best = scores.masked_fill(~partners, -torch.inf).amax(1, keepdim=True)
        worse_off = ((scores >= best) & ~partners).sum(1)
        found[start : start + rows] = torch.where(best[:, 0] == -torch.inf, len(items), worse_off)
    return found


def _recalls(found: Tensor) -> dict[str, float]:
    recalls = {f"R@{k}": (found < k).double().mean().item() for k in RECALLS}
    return recalls | {"median_rank": found.double().quantile(0.5).item() + 1}
