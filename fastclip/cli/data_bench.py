"""`fastclip data bench`: how many samples a second the data path gives here, and which stage is the limit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from fastclip.cli.options import optional, parse
from fastclip.cli.text import table


@dataclass(frozen=True)
class Bench:
    """Samples a second of each stage on one core, and of the whole loader.

    Example: fastclip data bench 'laion/{00000..00041}.tar' --workers 8
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = "synthetic:100000"
    """Shards, a table, a folder, or several with :: between them; by default made-up pairs of 256 pixels."""
    image_size: int = 224
    """Pixels along an edge of what a model sees."""
    batch: int = 256
    """Pairs of a batch."""
    workers: int = 0
    """Processes; 0 is one for each core."""
    tokenizer: Annotated[str, optional("PATH", "CLIP's")] = "ViT-B-32"
    """A tokenizers JSON or a model name."""
    fast_decode: bool = False
    """Decode at a reduced scale and resize with SIMD."""
    seconds: float = 2.0
    """Time of each stage; the loader has twice that."""
    json: bool = False
    """Print JSON instead of text."""


def main(arguments: Sequence[str]) -> None:
    """See `Bench`."""
    options = parse(Bench, "data bench", arguments)
    import torch

    from fastclip.data import DataOptions, Loader, get_tokenizer
    from fastclip.data.bench import loader_rate, stage_rates

    workers = options.workers or os.cpu_count() or 1
    tokenizer = get_tokenizer(options.tokenizer)
    choices = DataOptions(fast_decode=options.fast_decode)
    loader = Loader(options.source, tokenizer, options.image_size, options.batch, workers=workers, options=choices)
    torch.set_num_threads(1)
    stages = stage_rates(loader, tokenizer, options.seconds)
    whole = loader_rate(loader, 2 * options.seconds)
    limit = min(stages, key=stages.__getitem__)
    if options.json:
        print(json.dumps({"stages": stages, "loader": whole, "workers": workers, "limit": limit}))
        return
    total = sum(1 / rate for rate in stages.values())
    rows = [("stage", "samples/s of a core", "share of a core")]
    rows += [(name, f"{rate:,.0f}", f"{1 / rate / total:.0%}") for name, rate in stages.items()]
    print(loader.describe())
    print(table(rows))
    print(f"loader, {workers} workers: {whole:,.0f} samples/s, {whole / workers:,.0f} a worker")
    print(f"The limit is to {limit}." if limit != "crop and resize" else "The limit is the crop and resize.")
