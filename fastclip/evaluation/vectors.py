"""Many feature vectors on disk in fp16, in parts, with a FAISS index that finds the nearest of them.

A folder `images/` holds `part-00000.npy` ... (rows, D) fp16, `images.faiss` beside it the index over all rows. Up to
`EXACT` rows are compared one by one; above that FAISS looks into the nearest cells of a k-means partition, where it
compares codes of four bits for two dimensions, or for one where there are few, many at once (IndexIVFPQFastScan; Andre
et al. 2015). How many cells is measured when the index is made, on queries of the kind to come. The best candidates by
their codes are scored again in fp32 and sorted: best first, equal scores by number.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
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
_CODE_BITS, _FINE = 4, 256  # up to this width each dimension has a code of its own
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
                part = np.load(path, mmap_mode="r", allow_pickle=False)
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
        found = np.empty((len(numbers), self._parts[0].shape[1]), dtype=np.float32)
        for part in np.unique(part_of):
            here = part_of == part
            found[here] = self._parts[part][numbers[here] - self._starts[part]]
        return torch.from_numpy(found)

    def build(self, queries: Tensor | None = None, recall: float = RECALL) -> dict[str, Any]:
        """Writes the index over all parts and returns {"cells", "looked_into", "recall"}; nothing for few rows.

        queries: (Q, D) such as will be asked, to measure with; None takes rows of the collection.
        """
        path = self._folder.with_suffix(".faiss")
        path.unlink(missing_ok=True)
        self._index = None
        if len(self) <= EXACT:
            return {"cells": 0, "looked_into": 0, "recall": 1.0}
        faiss = faiss_module()
        cells = max(1, len(self) // _ROWS_PER_CELL)
        cells = min(cells, int(4 * len(self) ** 0.5))
        width = self._parts[0].shape[1]
        codes = width // 2 if width > _FINE and width % 2 == 0 else width
        index = faiss.IndexIVFPQFastScan(
            faiss.IndexFlatIP(width), width, cells, codes, _CODE_BITS, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.seed, index.cp.niter = 0, 10
        generator = np.random.default_rng(0)
        sample = np.sort(generator.choice(len(self), min(len(self), 50 * cells), replace=False))
        index.train(self.rows(sample).numpy())
        for part, start in zip(self._parts, self._starts, strict=False):
            block = np.asarray(part, dtype=np.float32)
            full = block.any(1)
            index.add_with_ids(block[full], np.arange(start, start + len(block))[full])
        self._index = index
        asked = self.rows(np.sort(generator.choice(len(self), 256, replace=False))) if queries is None else queries
        looked_into, reached = self._measure(asked, recall)
        faiss.write_index(index, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
        return {"cells": cells, "looked_into": looked_into, "recall": reached}

    def _measure(self, queries: Tensor, recall: float) -> tuple[int, float]:
        """The fewest cells (in steps of a half) in which the ten nearest are found, and how many of them are."""
        wanted = self._exact(queries, MEASURED, None)[1]
        self.cells = 1
        while True:
            found = [set(self.nearest(query[None], MEASURED)[1][0]) for query in queries]
            hits = [len(one & set(true)) / len(true) for one, true in zip(found, wanted.tolist(), strict=True)]
            reached = sum(hits) / len(hits)
            if reached >= recall or self.cells >= self._index.nlist:
                return self.cells, reached
            self.cells = min(self._index.nlist, self.cells + max(1, self.cells // 2))

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
        parameters = faiss.SearchParametersIVF(**options)
        _, candidates = self._index.search(queries.float().numpy(), max(_LEAST, _SPARE * k), params=parameters)
        all_scores, all_found = [], []
        for query, row in zip(queries, candidates, strict=True):
            numbers = np.sort(row[row >= 0])
            scores, places = self._exact(query[None], k, numbers)
            all_scores.append(scores[0].tolist())
            all_found.append(places[0].tolist())
        return all_scores, all_found

    def _exact(self, queries: Tensor, k: int, among: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """Scores and numbers (Q, K) by comparison with every row, part by part, or with those `among` alone."""
        queries = torch.cat([queries.float(), torch.ones(len(queries), 1)], 1)
        if among is not None:
            numbers = np.sort(among)
            if not len(numbers):
                return torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
            scores, places = search(queries, _marked(self.rows(numbers)), k)
            return scores, torch.from_numpy(numbers)[places]
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


def _marked(features: Tensor) -> Tensor:
    """The rows with one more column that puts a row of zeros, which stands for nothing, behind all others."""
    return torch.cat([features, torch.where(features.any(1), 0.0, -4.0)[:, None]], 1)
