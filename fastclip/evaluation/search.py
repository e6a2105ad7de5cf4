"""Search by features: the exact best items of any number of queries, and the pictures or captions they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastclip.data import EvalSet
from fastclip.evaluation.encoder import Encoder

if TYPE_CHECKING:
    from PIL.Image import Image

_QUERIES, _ITEMS = 256, 8192  # scores held at once; a multiple of every CPU kernel's tile
_LOW = (1 << 32) - 1


def search(queries: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best items of each query by inner product: (scores fp32 (Q, K), indices int64 (Q, K)), K = min(k, N).

    Exact, best first; of equal scores the smaller index comes first. Blocks of fixed size are scored in fp32 and merged
    into the K best so far: memory is O(Q k + block), whatever N is.

    Args:
        queries: (Q, D); of unit length for cosine scores, as the features.
        features: (N, D), on the queries' device; N below 2^32.
        k: at least 1.

    Errors: `ValueError` for other shapes, an empty collection, k below 1, or a score that is NaN.
    """
    if queries.dim() != 2 or features.dim() != 2 or queries.shape[1] != features.shape[1]:
        raise ValueError(
            f"queries and features must be (Q, D) and (N, D), were {tuple(queries.shape)} and {tuple(features.shape)}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, was {k}")
    if not 0 < len(features) <= _LOW:
        raise ValueError(f"features must have 1 to {_LOW} rows, had {len(features)}")
    count = min(k, len(features))
    if not len(queries):
        return queries.new_empty(0, count, dtype=torch.float32), queries.new_empty(0, count, dtype=torch.int64)
    found = torch.cat([_best_keys(rows.float(), features, count) for rows in queries.split(_QUERIES)])
    return _score(found >> 32), _LOW - (found & _LOW)


def _best_keys(queries: Tensor, features: Tensor, count: int) -> Tensor:
    """The `count` largest keys of each query, descending: int64 (Q, count).

    A key holds the score above and the complement of the index below: no two are equal, so what top-k does with ties
    does not matter.
    """
    best = queries.new_empty(len(queries), 0, dtype=torch.int64)
    size = min(_ITEMS, -(-len(features) // 64) * 64)
    for start in range(0, len(features), size):
        block = features[start : start + size].float()
        rows = len(block)
        if rows < size:  # the same product for every block: a row's score does not depend on where it lies
            block = torch.cat([block, block.new_zeros(size - rows, block.shape[1])])
        scores = (queries @ block.T)[:, :rows]
        if scores.isnan().any():
            raise ValueError("features: a score is NaN; queries and features must be finite")
        index = torch.arange(start, start + rows, device=scores.device)
        keys = torch.cat([best, (_ordered(scores) << 32) | (_LOW - index)], 1)
        best = keys.topk(min(count, keys.shape[1]), dim=1).values
    return best


def _ordered(scores: Tensor) -> Tensor:
    """fp32 as int64 in the same order; -0 becomes 0."""
    bits = (scores + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def _score(ordered: Tensor) -> Tensor:
    """What `_ordered` was given."""
    bits = ordered.int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


class FoundImage(NamedTuple):
    """An image of a held-out set: its cosine score, its set, its key, its first caption and its file."""

    score: float
    set_name: str
    key: str
    caption: str
    file: bytes


class FoundCaption(NamedTuple):
    """A caption and its cosine score."""

    score: float
    caption: str


def best_images(encoder: Encoder, sentence: str, sets: Mapping[str, EvalSet], k: int) -> list[FoundImage]:
    """The `k` images of all `sets` that fit `sentence` best.

    Errors: `ValueError` for a sentence without a word, or k below 1.
    """
    if not sentence.strip():
        raise ValueError("the sentence is empty: say what to look for")
    query = encoder.texts([sentence])
    features = torch.cat([encoder.images(eval_set) for eval_set in sets.values()])
    places = [(name, number) for name, eval_set in sets.items() for number in range(len(eval_set))]
    found = []
    for score, index in _ranked(query, features, k):
        name, number = places[index]
        eval_set = sets[name]
        first = int(torch.searchsorted(eval_set.caption_image, number))
        file = eval_set.image_file(number)
        found.append(FoundImage(score, name, eval_set.keys[number], eval_set.captions[first], file))
    return found


def best_captions(encoder: Encoder, image: Image, sets: Mapping[str, EvalSet], k: int) -> list[FoundCaption]:
    """The `k` different captions of all `sets` that fit `image` best."""
    captions = list(dict.fromkeys(caption for eval_set in sets.values() for caption in eval_set.captions))
    ranked = _ranked(encoder.image(image)[None], encoder.texts(captions), k)
    return [FoundCaption(score, captions[index]) for score, index in ranked]


def _ranked(query: Tensor, features: Tensor, k: int) -> list[tuple[float, int]]:
    scores, indices = search(query, features, k)
    return list(zip(scores[0].tolist(), indices[0].tolist(), strict=True))
