"""Where samples come from: shards here or elsewhere, tables, folders, made up, or a mixture of them.

A source is cut into shards (tar files, or stretches of a table or folder) of known counts. The listing stays with the
process that draws the order; what reads a sample knows nothing but the name of its shard, so a worker's memory does not
grow with the number of shards.
"""

import json
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods, get_context
from typing import Any, Protocol

import numpy as np

from fastclip.data.faults import BrokenSample
from fastclip.data.fetch import Fetcher, is_remote
from fastclip.data.scan import Sample, Scan, scan_of
from fastclip.data.shards import ShardSpec, expand_braces, expand_shards

SEPARATOR = "::"
_OPEN_SHARDS = 256
_OPEN_SAMPLES = 1 << 19  # whose places an open shard holds
_POOL_FROM = 64  # shards without an index

Spec = ShardSpec


class SampleReader(Protocol):
    """Reads sample `number` of the shard called `shard`. Errors: `BrokenSample`, `OSError`."""

    def read(self, shard: str, number: int) -> Sample: ...


@dataclass
class Source:
    """A listing of shards: `names` bytes (shards,), `counts` int64 (shards,), and how to read them."""

    title: str
    names: np.ndarray
    counts: np.ndarray
    reader: SampleReader
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def name(self, shard: int) -> str:
        """The name of a shard, for `reader`."""
        return os.fsdecode(self.names[shard])


class TarReader:
    """Samples of tar shards; keeps the last ones open."""

    def __init__(self, fetcher: Fetcher | None = None) -> None:
        self._fetcher = fetcher or Fetcher()
        self._open: OrderedDict[str, tuple[int, Scan]] = OrderedDict()
        self._samples = 0

    def read(self, shard: str, number: int) -> Sample:
        """See `SampleReader`."""
        file, scan = self.shard(shard)
        if number >= len(scan):
            raise BrokenSample("shrunk_shard", f"{shard!r} holds {len(scan)} samples, more were promised")
        return scan.read(file, number)

    def shard(self, name: str) -> tuple[int, Scan]:
        """A descriptor of the shard, and its scan."""
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        path = self.path(name)
        opened = os.open(path, os.O_RDONLY), scan_of(path, keep=True)
        self._open[name] = opened
        self._samples += len(opened[1])
        while len(self._open) > _OPEN_SHARDS or (self._samples > _OPEN_SAMPLES and len(self._open) > 1):
            file, scan = self._open.popitem(last=False)[1]
            self._samples -= len(scan)
            os.close(file)
        return opened

    def path(self, name: str) -> str:
        """The shard's file here, fetched if need be. Errors: `BrokenSample`."""
        if not is_remote(name):
            return name
        try:
            return self._fetcher.local(name)
        except OSError as error:
            raise BrokenSample("unreachable_shard", error) from error

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1][0])
        self._samples = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_fetcher": self._fetcher, "_open": OrderedDict(), "_samples": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state

    def __del__(self) -> None:
        self.close()


def tar_source(spec: Spec, split: str | None = None, fetcher: Fetcher | None = None) -> Source:
    """Tar shards by path, folder, glob, braces, URL or `pipe:`; their scans are read, or made and kept beside them.

    Errors: those of `expand_shards`.
    """
    parts = [spec] if isinstance(spec, (str, os.PathLike)) else list(spec)
    names: list[str] = []
    for part in [os.fspath(part) for part in parts]:
        names += expand_braces(part) if is_remote(part) else expand_shards(part, split)
    if not names:
        expand_shards([])
    reader = TarReader(fetcher)
    counts = np.zeros(len(names), np.int64)
    skipped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    count = _count_many if len(names) >= _POOL_FROM else _count_here
    for shard, (samples, causes, some) in enumerate(count(reader, names)):
        counts[shard] = samples
        skipped += causes
        examples = some | examples
    reader.close()
    return Source(_title(parts), _compact(names), counts, reader, skipped, examples)


_Counted = tuple[int, Counter[str], dict[str, str]]


def _count(reader: TarReader, name: str) -> _Counted:
    try:
        _, scan = reader.shard(name)
    except (OSError, BrokenSample) as error:
        cause = str(error) if isinstance(error, BrokenSample) else "unreadable_shard"
        return 0, Counter({cause: 1}), {cause: f"{name!r}: {getattr(error, 'detail', error)}"}
    return len(scan), scan.skipped, scan.examples


def _count_here(reader: TarReader, names: list[str]) -> list[_Counted]:
    return [_count(reader, name) for name in names]


def _count_apart(job: tuple[TarReader, list[str]]) -> list[_Counted]:
    reader, names = job
    try:
        return _count_here(reader, names)
    finally:
        reader.close()


def _count_many(reader: TarReader, names: list[str]) -> list[_Counted]:
    """The same by several processes, a few shards each at a time."""
    jobs = [(reader, names[first : first + 16]) for first in range(0, len(names), 16)]
    with ProcessPoolExecutor(
        min(os.cpu_count() or 1, 16), mp_context=get_context("fork" if "fork" in get_all_start_methods() else "spawn")
    ) as pool:
        return [counted for some in pool.map(_count_apart, jobs) for counted in some]


def index_source(path: str, fetcher: Fetcher | None = None) -> Source:
    """Shards listed by a JSON in the layout of `wids`: {"shardlist": [{"url": name, "nsamples": count}, ...]}.

    Nothing is opened: the counts are believed, and what a shard does not hold is counted as shrunk_shard. A relative
    name is meant from the JSON's folder. Errors: `ValueError` for another layout, and for a `pipe:` in it: a file that
    was downloaded must not run commands.
    """
    try:
        with open(path, encoding="utf-8") as file:
            shards = json.load(file)["shardlist"]
        names, counts = [str(shard["url"]) for shard in shards], [int(shard["nsamples"]) for shard in shards]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f'data: {path} is no shard index, {{"shardlist": [{{"url": ..., "nsamples": ...}}]}} ({error!r})'
        ) from error
    if any(name.startswith("pipe:") for name in names):
        raise ValueError(f"data: {path} names a pipe: command; commands are taken from the command line only")
    if any(count < 0 for count in counts):
        raise ValueError(f"data: {path} holds a negative nsamples")
    folder = os.path.dirname(path)
    names = [name if is_remote(name) else os.path.join(folder, name) for name in names]
    return Source(os.path.basename(path), _compact(names), np.array(counts, np.int64), TarReader(fetcher))


def shard_index(source: Source, folder: str = "") -> dict[str, Any]:
    """The JSON that `index_source` reads, names relative to `folder`."""
    names = [source.name(shard) for shard in range(len(source.counts))]
    urls = [name if is_remote(name) else os.path.relpath(name, folder or ".") for name in names]
    listed = [{"url": url, "nsamples": int(count)} for url, count in zip(urls, source.counts, strict=True)]
    return {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed}


def make_sources(
    spec: Spec,
    split: str | None = None,
    fetcher: Fetcher | None = None,
    image_key: str = "",
    caption_key: str = "",
) -> list[Source]:
    """The sources that `spec` means: `a::b` or a list is a mixture; each part is one of

    | part | samples |
    |---|---|
    | `x/{000..999}.tar`, `x/*.tar`, a folder of tars | img2dataset's and WebDataset's shards |
    | `s3://...{000..999}.tar`, `pipe:aws s3 cp ... -` | the same from elsewhere |
    | `x.json` | a `wids` shard index |
    | `x.csv`, `x.tsv`, `x.parquet` | paths and captions |
    | a folder of images | `a.jpg` with `a.txt` or `a.json` |
    | `synthetic:1000000` | made up, for benchmarks |

    Errors: those of the parts.
    """
    parts = spec.split(SEPARATOR) if isinstance(spec, str) else [spec] if isinstance(spec, os.PathLike) else list(spec)
    tars: list[str] = []
    sources: list[Source] = []
    for part in [os.fspath(part) for part in parts]:
        make = _maker(part, image_key, caption_key, fetcher)
        if make is None and not isinstance(spec, str):
            tars.append(part)  # a list of tar files is one source
        else:
            sources.append(make() if make else tar_source(part, split, fetcher))
    return ([tar_source(tars, split, fetcher)] if tars or not parts else []) + sources


def _maker(part: str, image_key: str, caption_key: str, fetcher: Fetcher | None) -> Callable[[], Source] | None:
    """What makes the source of anything but tar shards."""
    from fastclip.data import files, tables

    if part.startswith("synthetic:"):
        return lambda: files.synthetic_source(part)
    if is_remote(part):
        return None
    if part.endswith(tables.SUFFIXES):
        return lambda: tables.table_source(part, image_key, caption_key)
    if part.endswith(".json"):
        return lambda: index_source(part, fetcher)
    if os.path.isdir(part) and not any(entry.name.endswith(".tar") for entry in os.scandir(part)):
        return lambda: files.folder_source(part)
    return None


def _compact(names: Sequence[str]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names], dtype=np.bytes_)


def _title(parts: Sequence[str | os.PathLike[str]]) -> str:
    return os.fspath(parts[0]) + (f" and {len(parts) - 1} more" if len(parts) > 1 else "")
