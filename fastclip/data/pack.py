"""Samples of any source, written as tar shards that a run reads fastest."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import numpy as np

from fastclip.data.captions import captions_of
from fastclip.data.faults import BrokenSample
from fastclip.data.scan import Sample
from fastclip.data.shards import write_shard
from fastclip.data.sources import Source

_SUFFIX_OF = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"BM": "bmp"}


@dataclass(frozen=True)
class _Job:
    sources: list[Source]
    folder: str
    shard: int
    size: int


def pack_shards(
    sources: list[Source], folder: str | os.PathLike[str], size: int = 10_000, workers: int = 1
) -> Iterator[tuple[str, int, Counter[str]]]:
    """Writes `00000.tar` and so on, `size` samples each, with `key.jpg`, `key.txt`, `key.json`; a key is the number of
    the sample, its old key is in the JSON. Yields name, samples and what was left out, by cause, of each shard.

    Errors: `ValueError` for a size below 1, or a folder that holds shards already.
    """
    folder = Path(folder)
    if size < 1:
        raise ValueError(f"size: must be at least 1, was {size}")
    if folder.is_dir() and any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds shards already; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(int(source.counts.sum()) for source in sources)
    jobs = (_Job(sources, os.fspath(folder), shard, size) for shard in range(-(-total // size)))
    if workers <= 1:
        yield from map(_write, jobs)
        return
    context = get_context("fork" if "fork" in get_all_start_methods() else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_write, jobs)


def _write(job: _Job) -> tuple[str, int, Counter[str]]:
    skipped: Counter[str] = Counter()
    written = 0

    def members() -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal written
        first = job.shard * job.size
        for number in range(first, first + job.size):
            try:
                sample = _numbered(job.sources, number)
                if sample is None:
                    break
                files = _files(sample)
            except (BrokenSample, OSError) as error:
                skipped[str(error) if isinstance(error, BrokenSample) else "unreadable_shard"] += 1
                continue
            written += 1
            yield f"{number:09d}", files

    name = f"{job.shard:05d}.tar"
    write_shard(os.path.join(job.folder, name), members())
    return name, written, skipped


def _numbered(sources: list[Source], number: int) -> Sample | None:
    """Sample `number` of all sources one behind the other; None behind the last."""
    for source in sources:
        ends = np.cumsum(source.counts)
        if number < int(ends[-1]):
            shard = int(np.searchsorted(ends, number, side="right"))
            return source.reader.read(source.name(shard), number - int(ends[shard] - source.counts[shard]))
        number -= int(ends[-1])
    return None


def _files(sample: Sample) -> dict[str, bytes]:
    """The members of a sample. Errors: `BrokenSample` where it has no image or caption."""
    captions = captions_of(sample)
    suffix = next((suffix for magic, suffix in _SUFFIX_OF.items() if sample.image.startswith(magic)), None)
    if suffix is None:
        raise BrokenSample("unreadable_image" if sample.image else "empty_image")
    meta = {**sample.meta, "source_key": sample.key} | ({"captions": captions} if len(captions) > 1 else {})
    return {suffix: sample.image, "txt": captions[0].encode(), "json": json.dumps(meta).encode()} | sample.arrays
