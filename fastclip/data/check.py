"""What is wrong with some data, found before a run is spent on it; and the captions of it, for a tokenizer."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods, get_context

from fastclip.data.captions import captions_of
from fastclip.data.decode import BrokenImage, decode_image
from fastclip.data.faults import BrokenSample
from fastclip.data.sources import Source, TarReader


@dataclass
class Checked:
    """The findings of one shard: samples that can be used, faults by cause, and one example of each."""

    name: str
    usable: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, cause: str, example: str) -> None:
        """One more of a cause."""
        self.faults[cause] += 1
        self.examples.setdefault(cause, example)


@dataclass(frozen=True)
class _Job:
    source: Source
    shard: int
    decodes: bool
    marks: bool


def check_shards(source: Source, decodes: bool = True, marks: bool = False, workers: int = 1) -> Iterator[Checked]:
    """Reads every sample of every shard; `decodes`: every image too; `marks`: tar shards' indices are rewritten without
    the samples that cannot be used, so that no run meets them again. In the order of the shards."""
    readable = Source(source.title, source.names, source.counts, source.reader)
    jobs = (_Job(readable, shard, decodes, marks) for shard in range(len(source.counts)))
    if workers <= 1:
        yield from map(_check, jobs)
        return
    context = get_context("fork" if "fork" in get_all_start_methods() else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_check, jobs)


def _check(job: _Job) -> Checked:
    source, name = job.source, job.source.name(job.shard)
    checked, broken = Checked(name), dict[int, str]()
    for number in range(int(source.counts[job.shard])):
        cause = _fault(source, name, number, job.decodes, checked)
        if cause:
            broken[number] = cause
    checked.usable = int(source.counts[job.shard]) - len(broken)
    if job.marks and broken and isinstance(source.reader, TarReader):
        _mark(source.reader, name, broken)
    return checked


def _fault(source: Source, name: str, number: int, decodes: bool, checked: Checked) -> str:
    """The cause why a sample cannot be used, or ""."""
    where = f"{number} of {name!r}"
    try:
        sample = source.reader.read(name, number)
        where = f"{sample.key!r} in {name!r}"
        captions_of(sample)
        if decodes:
            decode_image(sample.image)
        elif not sample.image:
            raise BrokenSample("empty_image")
    except BrokenImage as error:
        checked.add(error.cause, where)
        return error.cause
    except BrokenSample as error:
        checked.add(str(error), where)
        return str(error)
    except OSError as error:
        checked.add("unreadable_shard", f"{where}: {error}")
        return "unreadable_shard"
    return ""


def _mark(reader: TarReader, name: str, broken: dict[int, str]) -> None:
    """Writes the shard's index without its broken samples; what cannot be read now may be readable tomorrow."""
    path, scan = reader.path(name), reader.shard(name)[1]
    lasting = {number: cause for number, cause in broken.items() if cause not in ("unreadable_shard", "shrunk_shard")}
    if lasting:
        scan.without(lasting).save(path)


def all_captions(source: Source) -> Iterator[str]:
    """Every usable caption of a source."""
    for shard, count in enumerate(source.counts.tolist()):
        for number in range(count):
            try:
                yield from captions_of(source.reader.read(source.name(shard), number))
            except (BrokenSample, OSError):
                continue
