"""Many feature vectors on disk in fp16, in parts, with a FAISS index that finds the nearest of them.

A folder `images/` holds `part-00000.npy` ... (rows, D) fp16, `images.faiss` beside it the index over all rows. Up to
`EXACT` rows are compared one by one; above that FAISS projects on the rows' principal directions, looks into the
nearest cells of a k-means partition of them, and compares codes of four bits for one or two directions, many at once
(IndexIVFPQFastScan; Andre et al. 2015). How many directions and cells are enough is measured when the index is made, on
queries of the kind to come. The best candidates by their codes are scored again in fp32 and sorted: best first, equal
scores by number.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastclip.errors import UserError
from fastclip.evaluation.search import search

EXACT = 20_000
RECALL = 0.995  # of the ten nearest, that the number of cells is chosen for
MEASURED = 10
_ROWS_PER_CELL = 300
_DIRECTIONS = (64, 128)  # tried first; all of them where too few of the nearest are found with these
_CODE_BITS, _FINE = 4, 256  # up to this many directions each has a code of its own
_SPARE, _LEAST = 20, 200  # candidates scored again: for each result, and at least


def faiss_module() -> Any:
    """FAISS, or a UserError that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("a search index needs FAISS: pip install 'fastclip-kernels[search]'") from error
    return faiss


class Vectors:
    """The parts in `folder` and their index. A row of zeros stands for nothing and is never found."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: list[np.ndarray] = []
        self._starts = [0]
        self._index: Any = None
        self._kept: dict[int, Tensor] = {}
        self.cells = 0
        self._open_parts()

    def _open_parts(self) -> None:
        while (path := self.part_path(len(self._parts))).is_file():
            try:
                part = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            except (ValueError, OSError) as error:
                raise UserError(f"{path} is damaged ({error}): delete it and run fastclip index again") from error
            self._parts.append(part)
            self._starts.append(self._starts[-1] + len(part))

    def __len__(self) -> int:
        return self._starts[-1]

    def part_path(self, number: int) -> Path:
        """Where part `number` lies."""
        return self._folder / f"part-{number:05d}.npy"

    @property
    def parts(self) -> int:
        """How many parts are on disk."""
        return len(self._parts)

    def append(self, features: Tensor) -> None:
        """Writes one more part, under another name until it is whole."""
        path = self.part_path(self.parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.save(file, features.half().numpy())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self._open_parts()

    def rows(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """The rows with these numbers, fp32."""
        numbers = np.asarray(numbers, dtype=np.int64)
        part_of = np.searchsorted(self._starts, numbers, side="right") - 1
        found = np.empty((len(numbers), self._parts[0].shape[1]), dtype=np.float16)
        starts = np.flatnonzero(np.diff(part_of, prepend=-1))  # of runs that lie in one part
        for first, end in pairwise([*starts.tolist(), len(numbers)]):
            part = part_of[first]
            found[first:end] = self._parts[part][numbers[first:end] - self._starts[part]]
        return torch.from_numpy(found).float()

    def build(self, queries: Tensor | None = None, recall: float = RECALL) -> dict[str, Any]:
        """Writes the index over all parts and returns {"cells", "looked_into", "recall"}; nothing for few rows.

        queries: (Q, D) such as will be asked, to measure with; None takes rows of the collection.
        """
        path = self._folder.with_suffix(".faiss")
        path.unlink(missing_ok=True)
        self._index = None
        if len(self) <= EXACT:
            return {"cells": 0, "looked_into": 0, "recall": 1.0}
        generator = np.random.default_rng(0)
        asked = self.rows(np.sort(generator.choice(len(self), 256, replace=False))) if queries is None else queries
        wanted = self._exact(asked, MEASURED, None)[1].tolist()
        width = self._parts[0].shape[1]
        for directions in sorted({*(few for few in _DIRECTIONS if few < width), width}):
            self._index, cells = self._fill(directions, generator)
            looked_into, reached = self._measure(asked, wanted, cells, recall)
            if reached >= recall:
                break
        faiss_module().write_index(self._index, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
        return {"cells": cells, "looked_into": looked_into, "recall": reached}

    def _fill(self, directions: int, generator: np.random.Generator) -> tuple[Any, int]:
        """A FAISS index with all rows, projected on this many directions, and the number of its cells."""
        faiss = faiss_module()
        cells = max(1, len(self) // _ROWS_PER_CELL)
        cells = min(cells, int(4 * len(self) ** 0.5))
        codes = directions // 2 if directions > _FINE and directions % 2 == 0 else directions
        partition = faiss.IndexIVFPQFastScan(
            faiss.IndexFlatIP(directions), directions, cells, codes, _CODE_BITS, faiss.METRIC_INNER_PRODUCT
        )
        partition.cp.seed, partition.cp.niter = 0, 10
        sample = self.rows(np.sort(generator.choice(len(self), min(len(self), 50 * cells), replace=False))).numpy()
        turned = True  # within the principal directions, so that each code has its share of the variance
        projection = faiss.PCAMatrix(sample.shape[1], directions, 0, turned)
        index = faiss.IndexPreTransform(projection, partition)
        index.train(sample)
        for part, start in zip(self._parts, self._starts, strict=False):
            block = np.asarray(part, dtype=np.float32)
            full = block.any(1)
            index.add_with_ids(block[full], np.arange(start, start + len(block))[full])
        projection.have_bias = False  # the rows are centred; a query is not, so that all its scores move by the same
        return index, cells

    def _measure(self, queries: Tensor, wanted: list[list[int]], cells: int, recall: float) -> tuple[int, float]:
        """The fewest cells (in steps of a half) in which the wanted are found, and how many of them are."""
        self.cells = 1
        while True:
            found = [set(self.nearest(query[None], MEASURED)[1][0]) for query in queries]
            hits = [len(one & set(true)) / len(true) for one, true in zip(found, wanted, strict=True)]
            reached = sum(hits) / len(hits)
            if reached >= recall or self.cells >= cells:
                return self.cells, reached
            self.cells = min(cells, self.cells + max(1, self.cells // 2))

    def open_index(self, cells: int) -> None:
        """Reads the index that `build` wrote, to look into `cells` cells."""
        path = self._folder.with_suffix(".faiss")
        if cells:
            if not path.is_file():
                raise UserError(f"{path} is missing: run fastclip index again, it goes on where it stopped")
            self._index, self.cells = faiss_module().read_index(os.fspath(path)), cells

    def nearest(
        self, queries: Tensor, k: int, among: np.ndarray | None = None
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Scores and numbers of the k rows nearest to each query, fewer where there are fewer.

        among: int64, the numbers to choose from; None for all.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, was {k}")
        if self._index is None or (among is not None and len(among) <= EXACT):
            scores, found = self._exact(queries, k, among)
            kept = [[place for place, score in enumerate(row) if score > -2] for row in scores.tolist()]
            return (
                [[scores[q, p].item() for p in places] for q, places in enumerate(kept)],
                [[int(found[q, p]) for p in places] for q, places in enumerate(kept)],
            )
        faiss = faiss_module()
        options: dict[str, Any] = {"nprobe": self.cells}
        if among is not None:
            options["sel"] = faiss.IDSelectorBatch(among)
        parameters = faiss.SearchParametersPreTransform(index_params=faiss.SearchParametersIVF(**options))
        _, candidates = self._index.search(queries.float().numpy(), max(_LEAST, _SPARE * k), params=parameters)
        all_scores, all_found = [], []
        for query, row in zip(queries, candidates, strict=True):
            numbers = np.sort(row[row >= 0])
            scores, places = _scored(query[None].float(), numbers, self.rows(numbers), k)
            all_scores.append(scores[0].tolist())
            all_found.append(places[0].tolist())
        return all_scores, all_found

    def _exact(self, queries: Tensor, k: int, among: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """Scores and numbers (Q, K) by comparison with every row, part by part, or with those `among` alone."""
        if among is not None:
            rows = self.rows(numbers := np.sort(among))
            full = rows.any(1)
            return _scored(queries.float(), numbers[full.numpy()], rows[full], k)
        queries = torch.cat([queries.float(), torch.ones(len(queries), 1)], 1)
        best_scores, best = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        for number, start in enumerate(self._starts[:-1]):
            if self._starts[number + 1] == start:
                continue
            scores, places = search(queries, self._block(number), k)
            best_scores, best = torch.cat([best_scores, scores], 1), torch.cat([best, places + start], 1)
            best_scores, order = best_scores.sort(dim=1, descending=True, stable=True)  # equal scores stay by number
            best_scores, best = best_scores[:, :k], best.gather(1, order)[:, :k]
        return best_scores, best

    def _block(self, number: int) -> Tensor:
        """A part as `_marked` rows; kept where the whole collection is small."""
        if number not in self._kept:
            block = _marked(torch.from_numpy(np.asarray(self._parts[number], dtype=np.float32)))
            if len(self) > EXACT:
                return block
            self._kept[number] = block
        return self._kept[number]


def _scored(queries: Tensor, numbers: np.ndarray, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and numbers (Q, K) of the best of these rows, none of which stands for nothing."""
    if not len(numbers):
        return torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    scores, places = search(queries, rows, k)
    return scores, torch.from_numpy(numbers)[places]


def _marked(features: Tensor) -> Tensor:
    """The rows with one more column that puts a row of zeros, which stands for nothing, behind all others."""
    return torch.cat([features, torch.where(features.any(1), 0.0, -4.0)[:, None]], 1)
