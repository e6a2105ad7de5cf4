"""`fastclip data check`: what is broken in some data, before a run meets it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.cli.options import optional, parse
from fastclip.cli.text import printable


@dataclass(frozen=True)
class Check:
    """Find what a run would skip: truncated tars, broken images, missing pairs ...

    Reads every sample. Each cause is told with its number and one example.

    Example: fastclip data check 'laion/{00000..00041}.tar' --index i.json
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Shards, a table, a folder, or several with :: between them, as for --data of a run."""
    skip_decode: bool = False
    """Read only; by default every image is decoded."""
    mark: bool = False
    """Rewrite the shards' indices (x.tar.index.npz) without the broken samples, so that no run meets them again."""
    index: Annotated[str, optional("PATH", "none")] = ""
    """Write a list of the shards with their counts there, which a run takes as --data and starts from at once."""
    workers: int = 2
    """Processes."""
    strict: bool = False
    """Exit status 1 where anything is wrong."""
    json: bool = False
    """Print JSON instead of text."""


def main(arguments: Sequence[str]) -> int:
    """See `Check`."""
    from tqdm import tqdm

    options = parse(Check, "data check", arguments)
    from fastclip.data.check import check_shards
    from fastclip.data.sources import make_sources, shard_index

    if options.workers < 1:
        raise ValueError(f"--workers must be at least 1, was {options.workers}")
    sources = make_sources(options.source)
    if options.index and len(sources) > 1:
        raise ValueError("--index lists the shards of one source: check them one by one")
    faults: Counter[str] = Counter()
    examples: dict[str, str] = {}
    usable = samples = shards = 0
    for source in sources:
        faults += source.skipped
        examples = source.examples | examples
        checked = check_shards(source, not options.skip_decode, options.mark, options.workers)
        for found in tqdm(checked, source.title, len(source.counts), unit="shard", disable=None):
            usable, faults, examples = usable + found.usable, faults + found.faults, found.examples | examples
        samples, shards = samples + int(source.counts.sum()), shards + len(source.counts)
    if options.json:
        found = {"samples": samples, "shards": shards, "usable": usable, "faults": dict(faults), "examples": examples}
        print(json.dumps(found))
    else:
        _tell(samples, shards, usable, faults, examples)
    if options.index:
        source = make_sources(options.source)[0] if options.mark else sources[0]
        path = Path(options.index)
        path.write_text(json.dumps(shard_index(source, str(path.parent)), indent=1))
        told = sys.stderr if options.json else sys.stdout
        print(f"{path}: {len(source.counts):,} shards, {int(source.counts.sum()):,} samples", file=told)
    return int(options.strict and bool(faults))


def _tell(samples: int, shards: int, usable: int, faults: Counter[str], examples: dict[str, str]) -> None:
    print(f"{samples:,} samples in {shards:,} shards, {usable:,} can be used")
    for cause, count in faults.most_common():
        print(f"  {count:>9,}  {cause.replace('_', ' '):<20} {printable(examples.get(cause, ''))}")
    if not faults:
        print("  nothing is wrong")
