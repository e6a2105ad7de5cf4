"""`fastclip data pack`: a folder or a table as shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.cli.options import optional, parse


@dataclass(frozen=True)
class Pack:
    """Write a folder of images, a CSV, TSV or Parquet as tar shards.

    Images are copied as they are. What has no image or no caption is left out.

    Example: fastclip data pack captions.csv data/mine
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder with a.jpg and a.txt or a.json, a table of paths and captions, Parquet with images in it, or shards."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder to write 00000.tar and so on into."""
    shard_size: int = 10_000
    """Samples of a shard."""
    image_key: Annotated[str, optional("NAME", "filepath, image ...")] = ""
    """The table's column of images."""
    caption_key: Annotated[str, optional("NAME", "title, caption ...")] = ""
    """The table's column of captions."""
    workers: int = 2
    """Processes."""


def main(arguments: Sequence[str]) -> None:
    """See `Pack`."""
    from tqdm import tqdm

    options = parse(Pack, "data pack", arguments)
    from fastclip.data.embedded import embedded_source
    from fastclip.data.pack import pack_shards
    from fastclip.data.sources import make_sources

    keys = (options.image_key, options.caption_key)
    embedded = embedded_source(options.source, *keys) if options.source.endswith(".parquet") else None
    sources = [embedded] if embedded else make_sources(options.source, None, None, *keys)
    total = sum(int(source.counts.sum()) for source in sources)
    skipped = sum((source.skipped for source in sources), Counter[str]())
    written, shards = 0, 0
    with tqdm(total=total, unit="pair", disable=None) as bar:
        for _, samples, causes in pack_shards(sources, options.target, options.shard_size, options.workers):
            written, shards, skipped = written + samples, shards + 1, skipped + causes
            bar.update(samples + causes.total())
    left_out = ", ".join(f"{count:,} {cause.replace('_', ' ')}" for cause, count in skipped.most_common())
    print(f"{options.target}: {written:,} pairs in {shards:,} shards; left out: {left_out or 'nothing'}")
