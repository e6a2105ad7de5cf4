"""Image <-> text retrieval with any number of captions an image, in memory that grows with the queries alone.

The scores of all pairs are computed once, tile by tile, and serve both directions. Tiles have one shape, so that a
score has the same bits wherever it is computed and equal scores can be told from unequal ones.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

RECALLS = (1, 5, 10)
_IMAGES, _TEXTS = 256, 2048  # one tile of scores


def retrieval(
    image_features: Tensor, text_features: Tensor, caption_image: Tensor, group: dist.ProcessGroup | None = None
) -> dict[str, dict[str, float]]:
    """R@1, R@5, R@10 and the median rank, both ways: {"image_to_text": {...}, "text_to_image": {...}}.

    As in the CLIP paper: R@k is the share of queries with a true partner among their k best; an image has all its
    captions as partners, a caption its one image. The median rank counts from 1.

    Args:
        image_features: (N, D) of unit length.
        text_features: (M, D) of unit length.
        caption_image: (M,) int64, the image of each caption.
        group: ranks that share the work; each holds the same features.
    """
    image_ranks, text_ranks = ranks(image_features, text_features, caption_image, group)
    return {"image_to_text": _recalls(image_ranks), "text_to_image": _recalls(text_ranks)}


def ranks(
    image_features: Tensor, text_features: Tensor, caption_image: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """How many items stand before the best partner of each image (N,) and each caption (M,): int64, 0 is a hit.

    Items are sorted by falling score, equal scores by index. An image without a caption has rank M.
    """
    images, texts = len(image_features), len(text_features)
    if len(caption_image) != texts:
        raise ValueError(f"caption_image has {len(caption_image)} entries, must have {texts}, one a text")
    if not texts or caption_image.min() < 0 or caption_image.max() >= images:
        raise ValueError(f"caption_image must name at least one caption, each of an image in [0, {images})")
    tiles = _Tiles(image_features, text_features)
    pairs = _pair_scores(tiles, caption_image)
    best = torch.full((images,), -torch.inf, dtype=tiles.dtype).scatter_reduce(0, caption_image, pairs, "amax")
    first = torch.full((images,), texts)  # the best caption of each image, the first of equals
    is_best = pairs == best[caption_image]
    first.scatter_reduce_(0, caption_image[is_best], torch.arange(texts)[is_best], "amin")

    image_ranks, text_ranks = torch.zeros(images, dtype=torch.int64), torch.zeros(texts, dtype=torch.int64)
    rank = 0 if group is None else dist.get_rank(group)
    world_size = 1 if group is None else dist.get_world_size(group)
    for i in range(rank * _IMAGES, images, world_size * _IMAGES):
        for t in range(0, texts, _TEXTS):
            scores = tiles.scores(i, t)
            rows, columns = scores.shape
            image_ranks[i : i + rows] += _ahead(scores, best[i : i + rows], first[i : i + rows] - t)
            text_ranks[t : t + columns] += _ahead(scores.T, pairs[t : t + columns], caption_image[t : t + columns] - i)
    if group is not None:
        dist.all_reduce(image_ranks, group=group)
        dist.all_reduce(text_ranks, group=group)
    return torch.where(best == -torch.inf, texts, image_ranks), text_ranks


class _Tiles:
    """The scores image_features @ text_features.T in tiles that are all products of the same shape."""

    def __init__(self, image_features: Tensor, text_features: Tensor) -> None:
        self.dtype = torch.promote_types(image_features.dtype, torch.float32)
        self._images, self._texts = image_features.to(self.dtype), text_features.to(self.dtype)
        self._scores = torch.empty(_IMAGES, _TEXTS, dtype=self.dtype)
        for name, features in (("image_features", image_features), ("text_features", text_features)):
            if not features.isfinite().all():
                raise ValueError(f"{name} must be finite, holds NaN or infinity")

    def scores(self, i: int, t: int) -> Tensor:
        """The tile that begins at image i and text t, cut where they end. It lives until the next one is asked for."""
        images, texts = self._images[i : i + _IMAGES], self._texts[t : t + _TEXTS]
        torch.mm(_padded(images, _IMAGES), _padded(texts, _TEXTS).T, out=self._scores)
        return self._scores[: len(images), : len(texts)]


def _padded(features: Tensor, rows: int) -> Tensor:
    missing = rows - len(features)
    return torch.cat([features, features.new_zeros(missing, features.shape[1])]) if missing else features


def _pair_scores(tiles: _Tiles, caption_image: Tensor) -> Tensor:
    """The score of each caption with its image (M,), from the tiles that hold such a pair."""
    found = torch.empty(len(caption_image), dtype=tiles.dtype)
    for t in range(0, len(caption_image), _TEXTS):
        owners = caption_image[t : t + _TEXTS]
        for i in (owners // _IMAGES).unique().tolist():
            here = (owners // _IMAGES == i).nonzero()[:, 0]
            found[t + here] = tiles.scores(i * _IMAGES, t)[owners[here] - i * _IMAGES, here]
    return found


def _ahead(scores: Tensor, partner: Tensor, place: Tensor) -> Tensor:
    """How many scores of each row stand before `partner`, which lies in column `place` (it may be beyond either end).

    What has a higher score stands before it, and what has the same score and a smaller column. Where the partner lies
    right of the tile, that is every score above the next smaller number.
    """
    lowest = torch.full_like(partner, -torch.inf)
    above = torch.where(place >= scores.shape[1], torch.nextafter(partner, lowest), partner)
    count = torch.gt(scores, above[:, None], out=torch.empty_like(scores)).sum(1).int()  # a sum below 2^24: exact
    inside = ((place > 0) & (place < scores.shape[1])).nonzero()[:, 0]
    earlier = torch.arange(scores.shape[1]) < place[inside, None]
    count[inside] += ((scores[inside] == partner[inside, None]) & earlier).sum(1, dtype=torch.int32)
    return count


def _recalls(found: Tensor) -> dict[str, float]:
    recalls = {f"R@{k}": (found < k).double().mean().item() for k in RECALLS}
    return recalls | {"median_rank": found.double().quantile(0.5).item() + 1}
