"""Problems with every option of `contrastive_loss`, whole and as each rank sees them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "image": {"directions": "image", "reduction": "sum"},
    "text": {"directions": "text", "reduction": "none"},
    "normalize": {"normalize": True},
    "smoothing": {"label_smoothing": 0.2},
    "weights": {"weights": True},
    "weights, none": {"weights": True, "reduction": "none"},
    "labels": {"labels": True},
    "positive": {"group_ids": True},
    "positive, none": {"group_ids": True, "reduction": "none"},
    "ignore": {"group_ids": True, "group_mode": "ignore"},
    "ignore, labels": {"group_ids": True, "group_mode": "ignore", "labels": True, "weights": True, "normalize": True},
    "everything": {
        "group_ids": True,
        "labels": True,
        "weights": True,
        "label_smoothing": 0.1,
        "normalize": True,
        "reduction": "sum",
    },
}


class Problem(NamedTuple):
    """Features of W ranks' pairs and texts, one after the other, and the options' tensors; counts by rank."""

    image: Tensor
    text: Tensor
    scale: Tensor
    labels: Tensor  # among a rank's own texts
    image_ids: Tensor
    text_ids: Tensor
    weights: Tensor
    images: tuple[int, ...]
    texts: tuple[int, ...]

    def options(self, wanted: dict[str, Any], rank: int | None = None) -> dict[str, Any]:
        """`wanted` with its tensors, for one rank or for all as if they were one."""
        given = dict(wanted)
        rows, columns = self.part(rank)
        if "labels" in given:
            given["labels"] = self.labels[rows] if rank is not None else self.whole_labels()
        elif rank is None and self.images != self.texts:
            given["labels"] = self.whole_labels(default=True)
        if "group_ids" in given:
            ids = self.image_ids if "labels" in wanted else self.default_ids()
            given["group_ids"] = (ids[rows], self.text_ids[columns])
        if "weights" in given:
            given["weights"] = self.weights.detach()[rows].clone().requires_grad_()
        return given

    def leaves(self, rank: int | None = None) -> list[Tensor]:
        rows, columns = self.part(rank)
        parts = (self.image[rows], self.text[columns], self.scale)
        return [x.detach().clone().requires_grad_() for x in parts]

    def part(self, rank: int | None) -> tuple[slice, slice]:
        if rank is None:
            return slice(None), slice(None)
        starts = (sum(counts[:rank]) for counts in (self.images, self.texts))
        rows, columns = (
            slice(start, start + counts[rank]) for start, counts in zip(starts, (self.images, self.texts), strict=True)
        )
        return rows, columns

    def whole_labels(self, default: bool = False) -> Tensor:
        own = torch.cat([torch.arange(n) for n in self.images]) if default else self.labels
        firsts = torch.tensor([sum(self.texts[:rank]) for rank in range(len(self.texts))])
        return own + firsts.repeat_interleave(torch.tensor(self.images))

    def default_ids(self) -> Tensor:
        return self.text_ids[self.whole_labels(default=True)]


def make_problem(images: tuple[int, ...], texts: tuple[int, ...], d: int = 7, seed: int = 0) -> Problem:
    """Random, in fp64, with groups of a few and labels in any order."""
    generator = torch.Generator().manual_seed(seed)
    n, m = sum(images), sum(texts)
    image, text = (
        F.normalize(torch.randn(rows, d, generator=generator, dtype=torch.float64), dim=1) for rows in (n, m)
    )
    labels = torch.cat([torch.randperm(t, generator=generator)[:i] for i, t in zip(images, texts, strict=True)])
    text_ids = torch.randint(0, max(2, m // 2), (m,), generator=generator) * 1000
    weights = torch.rand(n, generator=generator, dtype=torch.float64)
    problem = Problem(image, text, torch.tensor(8.0).double(), labels, labels, text_ids, weights, images, texts)
    return problem._replace(image_ids=text_ids[problem.whole_labels()])
