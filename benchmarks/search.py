"""Look-ups in a search index: latency and recall@10 beside an exact search, on one machine.

    python -m benchmarks.search --index runs/demo/index      an index that fastclip index made, asked by captions
    python -m benchmarks.search --images 100000 --width 512  features made up: 64 directions of variance, and noise

One line of JSON. A made-up query is a noisy item; of an index the queries are captions of its images, and what encoding
one takes is reported beside the look-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastclip.evaluation.search import search
from fastclip.evaluation.vectors import Vectors

QUERIES, K, DIRECTIONS, PART = 500, 10, 64, 8192


def made_up(images: int, width: int) -> tuple[Tensor, Tensor]:
    """Features (images, width) and queries (QUERIES, width) of unit length."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(DIRECTIONS, width, generator=generator)
    features = torch.randn(images, DIRECTIONS, generator=generator) @ spread
    features += 2 * torch.randn(images, width, generator=generator)
    queries = F.normalize(features[:: images // QUERIES][:QUERIES], dim=1)
    queries = queries + 0.5 * F.normalize(torch.randn(QUERIES, width, generator=generator), dim=1)
    return F.normalize(features, dim=1), F.normalize(queries, dim=1)


def milliseconds(call: Callable[[], Any]) -> float:
    """What one call takes."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measured(vectors: Vectors, queries: Tensor) -> dict[str, Any]:
    """p50 and p99 of one look-up of ten, and the share of the ten nearest that is found."""
    vectors.nearest(queries[:1], K)
    times = [milliseconds(lambda query=query: vectors.nearest(query[None], K)) for query in queries]  # type: ignore[misc]
    exact = search(queries, vectors.rows(range(len(vectors))), K)[1].tolist()
    found = vectors.nearest(queries, K)[1]
    recall = statistics.mean(len(set(one) & set(true)) / K for one, true in zip(found, exact, strict=True))
    times.sort()
    return {"p50_ms": round(times[len(times) // 2], 3), "p99_ms": round(times[-len(times) // 100], 3), "recall": recall}


def main() -> None:
    """Prints the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--index", default="")
    options = parser.parse_args()
    row: dict[str, Any] = {"threads": torch.get_num_threads()}
    if options.index:
        from fastclip.cli.indexes import open_index

        index, encoder = open_index(options.index, "", "", "fp32")
        step = max(1, len(index) // QUERIES)
        rows = index._rows("SELECT caption FROM items WHERE id % ? = 0 AND caption != ''", (step,))
        captions = [text for (text,) in rows[:QUERIES]]
        times = sorted(milliseconds(lambda text=text: encoder.texts([text])) for text in captions[:100])  # type: ignore[misc]
        row |= {"images": len(index), "width": encoder.config.embed_dim, "encode_p50_ms": round(times[50], 2)}
        row |= index.about["search"]["images"] | measured(index.images, encoder.texts(captions))
    else:
        features, queries = made_up(options.images, options.width)
        with tempfile.TemporaryDirectory() as folder:
            vectors = Vectors(Path(folder) / "images")
            for part in features.split(PART):
                vectors.append(part)
            start = time.monotonic()
            how = vectors.build(queries[::2])
            row |= {"images": options.images, "width": options.width, "build_s": round(time.monotonic() - start, 1)}
            row |= how | measured(vectors, queries[1::2])
    print(json.dumps(row))


if __name__ == "__main__":
    main()
