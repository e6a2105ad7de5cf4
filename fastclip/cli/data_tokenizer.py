"""`fastclip data tokenizer`: learn a tokenizer from the captions of some data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.cli.options import parse


@dataclass(frozen=True)
class Learn:
    """Learn CLIP's kind of tokenizer (byte-level BPE) from the captions of some data, and write a tokenizers JSON.

    Beside shards it is found as tokenizer.json; --tokenizer PATH names it otherwise.

    Example: fastclip data tokenizer data/mine data/mine/tokenizer.json --vocab-size 8192
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Shards, a table, a folder, or several with :: between them, as for --data of a run."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """The file to write."""
    vocab_size: int = 49_408
    """Most ids, 514 of them for bytes, start and end."""
    context_length: int = 77
    """Most tokens of a caption, start and end included."""


def main(arguments: Sequence[str]) -> None:
    """See `Learn`."""
    options = parse(Learn, "data tokenizer", arguments)
    from fastclip.data import train_tokenizer
    from fastclip.data.check import all_captions
    from fastclip.data.sources import make_sources

    if options.context_length < 3:
        raise ValueError(f"--context-length must be at least 3, was {options.context_length}")
    captions = [caption for source in make_sources(options.data) for caption in all_captions(source)]
    if not captions:
        raise ValueError(f"DATA {options.data} holds no caption")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(captions, options.out, options.vocab_size, options.context_length)
    lengths = sorted(len(tokenizer.encode(caption)) + 2 for caption in captions[:: max(1, len(captions) // 10_000)])
    print(
        f"{options.out}: {tokenizer.vocab_size:,} ids from {len(captions):,} captions; "
        f"tokens p50 {lengths[len(lengths) // 2]}, p95 {lengths[len(lengths) * 95 // 100]}, max {lengths[-1]} "
        f"of {tokenizer.context_length}"
    )
