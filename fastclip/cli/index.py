"""`fastclip index`: an index of many images, to search by sentence or by picture in a moment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.cli.loading import Source, chosen_checkpoint, load_encoder
from fastclip.cli.options import Checkpoint, Precision, TokenizerPath, optional, parse
from fastclip.errors import UserError


@dataclass(frozen=True)
class Index:
    """An index of the images of shards or of a folder, to search in a moment.

    Features are kept in fp16, in parts; an interrupted call goes on where it was.

    Example: fastclip index "data/demo/*_test-*.tar" --out runs/demo/index
    """

    source: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SHARDS|DIR", help_behavior_hint="")
    ] = ()
    """Shards (files, patterns, a folder with *.tar), or a folder of image files."""
    out: Annotated[str, optional("DIR", "needed")] = ""
    """Folder for the index."""
    captions: bool = False
    """Index captions too, to find sentences by a picture."""
    checkpoint: Checkpoint = ""
    """A run (its latest step), a step folder or a file of weights."""
    batch_size: int = 256
    """Images or texts in one forward."""
    precision: Precision = "fp32"
    """Of the model's computation."""
    tokenizer: TokenizerPath = ""
    """A tokenizers JSON, its folder, or a model name."""


def main(arguments: Sequence[str]) -> None:
    """See `Index`."""
    options = parse(Index, "index", arguments)
    if not options.source:
        raise UserError('there is nothing to index: name shards ("data/demo/*.tar") or a folder of images')
    if not options.out:
        raise UserError("--out must name the folder for the index")
    checkpoint = chosen_checkpoint(options.checkpoint)
    encoder = load_encoder(Source(checkpoint, Path()), options.tokenizer, options.precision, options.batch_size)
    from tqdm import tqdm

    from fastclip.evaluation.index import build_index, weights_fingerprint

    start, out = time.monotonic(), Path(options.out)
    about = build_index(
        encoder,
        options.source,
        out,
        model=weights_fingerprint(checkpoint),
        checkpoint=str(checkpoint),
        with_captions=options.captions,
        progress=lambda parts: tqdm(parts, desc="Encoding", unit="part"),
    )
    how = about["search"]["images"]
    found = (
        "compared one by one"
        if not how["cells"]
        else (f"{how['looked_into']} of {how['cells']} cells looked into, recall@10 {how['recall']:.1%}")
    )
    print(f"{about['images']:,} images in {out} ({found}; {time.monotonic() - start:.1f} s)")
    print(f'Search it: fastclip search "..." --index {out}, or fastclip serve --index {out}')
