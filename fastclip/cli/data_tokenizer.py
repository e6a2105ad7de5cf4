"""`fastclip data tokenizer`: learn a tokenizer from the captions of some data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.cli.options import parse


@dataclass(frozen=True)
class Tokenizer:
    """Learn CLIP's kind of tokenizer from the captions of some data.

    It is a byte-level BPE, and a `tokenizers` JSON.

    A run finds it as tokenizer.json beside the shards, or by --tokenizer PATH.

    Example: fastclip data tokenizer data/mine data/mine/tokenizer.json
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Shards, a table, a folder, or several with :: between them, as for --data of a run."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """The file to write."""
    vocab_size: Annotated[int, tyro.conf.arg(metavar="N")] = 49_408
    """Most ids, 514 of them for bytes, start and end."""
    context: Annotated[int, tyro.conf.arg(metavar="N")] = 77
    """Most tokens of a caption, start and end included."""


def main(arguments: Sequence[str]) -> None:
    """See `Tokenizer`."""
    options = parse(Tokenizer, "data tokenizer", arguments)
    from fastclip.data import train_tokenizer
    from fastclip.data.check import all_captions
    from fastclip.data.sources import make_sources

    if options.context < 3:
        raise ValueError(f"--context must be at least 3, was {options.context}")
    captions = [caption for source in make_sources(options.source) for caption in all_captions(source)]
    if not captions:
        raise ValueError(f"DATA {options.source} holds no caption")
    options.target.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(captions, options.target, options.vocab_size, options.context)
    lengths = sorted(len(tokenizer.encode(caption)) + 2 for caption in captions[:: max(1, len(captions) // 10_000)])
    print(
        f"{options.target}: {tokenizer.vocab_size:,} ids from {len(captions):,} captions; "
        f"tokens p50 {lengths[len(lengths) // 2]}, p95 {lengths[len(lengths) * 95 // 100]}, max {lengths[-1]} "
        f"of {tokenizer.context_length}"
    )
