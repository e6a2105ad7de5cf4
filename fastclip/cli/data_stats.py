"""`fastclip data stats`: what is in some shards, before a run is spent on them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastclip.cli.options import optional, parse
from fastclip.cli.text import megabytes

if TYPE_CHECKING:
    from fastclip.data import ShardIndex, Tokenizer

IMAGES_READ = 1000
SIZES_SHOWN = 4


@dataclass(frozen=True)
class Stats:
    """What some shards hold: samples, images, captions, and what a run would skip.

    Reads every caption, and up to 1,000 images of each set.

    Shards named <set>-00000.tar are counted set by set.

    Example: fastclip data stats data/demo
    """

    shards: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SHARDS", help_behavior_hint="(required)")
    ]
    """Folders, tar files, globs or patterns such as 'laion/{00000..00041}.tar'."""
    tokenizer: Annotated[str, optional("PATH", "tokenizer.json beside the shards")] = ""
    """A tokenizers JSON, its folder, or a model name: it measures the captions."""
    plot: Annotated[str, optional("PATH", "none")] = ""
    """Draw how long the captions are, in tokens (in words without a tokenizer), as a PNG or SVG there."""
    json: bool = False
    """Print JSON instead of text."""


def main(arguments: Sequence[str]) -> None:
    """See `Stats`."""
    options = parse(Stats, "data stats", arguments)
    if not options.shards:
        raise ValueError("SHARDS is empty: give a folder, a tar file, a glob or a pattern")
    from fastclip.data import ShardIndex, expand_shards, get_tokenizer

    paths = expand_shards(list(options.shards))
    beside = Path(paths[0]).parent / "tokenizer.json"
    name = options.tokenizer or (str(beside) if beside.is_file() else "")
    tokenizer = get_tokenizer(name) if name else None
    sets: dict[str, list[str]] = {}
    for path in paths:
        sets.setdefault(_set_name(path), []).append(path)
    stats = {name: _stats(ShardIndex(part), tokenizer) for name, part in sets.items()}
    if options.json:
        print(json.dumps({"tokenizer": name or None, "sets": stats}, indent=1))
    else:
        print("\n\n".join(_text(name, figures) for name, figures in stats.items()))
    if options.plot:
        from fastclip.cli.data_plot import draw_lengths

        draw_lengths({name: ShardIndex(part) for name, part in sets.items()}, tokenizer, options.plot)
        print(f"\nCaption lengths: {options.plot}", file=sys.stderr if options.json else sys.stdout)


def _set_name(path: str) -> str:
    """`train` of train-00003.tar; shards that are named by a number alone are one set."""
    match = re.fullmatch(r"(.+)-\d+\.tar", os.path.basename(path))
    return match[1] if match else "shards"


def _stats(index: ShardIndex, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The figures of one set, as `--json` prints them."""
    from fastclip.data.loader import BrokenSample, captions_of

    looked_at = {number * len(index) // IMAGES_READ for number in range(IMAGES_READ)}
    skipped, per_image, captions = Counter(index.skipped), Counter[int](), Counter[str]()
    sizes, formats, unreadable = Counter[str](), Counter[str](), 0
    for number in range(len(index)):
        sample = index.read(number)
        try:
            found = captions_of(sample)
            per_image[len(found)] += 1
            captions.update(found)
        except BrokenSample as error:
            skipped[str(error)] += 1
        if number in looked_at:
            kind = _image_kind(sample.image)
            if kind is None:
                unreadable += 1
            else:
                formats[kind[0]] += 1
                sizes[kind[1]] += 1
    return {
        "samples": len(index),
        "usable": per_image.total(),
        "shards": len(index.paths),
        "bytes": sum(os.path.getsize(path) for path in index.paths),
        "skipped": dict(skipped),
        "images": {
            "read": len(looked_at),
            "unreadable": unreadable,
            "formats": dict(formats.most_common()),
            "sizes": dict(sizes.most_common()),
        },
        "captions": {
            "count": captions.total(),
            "distinct": len(captions),
            "per_image": dict(sorted(per_image.items())),
            "most_common": captions.most_common(1),
        },
        "tokens": _lengths(captions, tokenizer) if tokenizer is not None and captions else None,
    }


def _image_kind(data: bytes) -> tuple[str, str] | None:
    """Format and "width x height" of an image, or None where it cannot be decoded."""
    from PIL import Image

    from fastclip.data.transforms import decode_image

    try:
        image = decode_image(data)
    except ValueError:
        return None
    with Image.open(BytesIO(data)) as opened:
        return str(opened.format), f"{image.width} x {image.height}"


def _lengths(captions: Counter[str], tokenizer: Tokenizer) -> dict[str, int]:
    """Tokens of a caption, start and end included, over all captions; `cut`: how many are longer than the context."""
    lengths = Counter[int]()
    for caption, count in captions.items():
        lengths[len(tokenizer.encode(caption)) + 2] += count
    context = tokenizer.context_length
    cut = sum(count for length, count in lengths.items() if length > context)
    return {
        "p50": _quantile(lengths, 0.5),
        "p95": _quantile(lengths, 0.95),
        "max": max(lengths),
        "context_length": context,
        "cut": cut,
    }


def _quantile(counts: Counter[int], share: float) -> int:
    """The smallest value that at least `share` of all do not pass."""
    passed = 0
    for value in sorted(counts):
        passed += counts[value]
        if passed >= share * counts.total():
            return value
    raise AssertionError("no counts")


def _text(name: str, stats: dict[str, Any]) -> str:
    """One set for a person to read."""
    images, captions, tokens = stats["images"], stats["captions"], stats["tokens"]
    shards = "shard" if stats["shards"] == 1 else "shards"
    lines = [
        f"{name}: {stats['samples']:,} samples, {stats['shards']:,} {shards}, {megabytes(stats['bytes'])}",
        f"  images    {_counts(images['formats'])}; {_counts(images['sizes'])}; {images['unreadable']:,} unreadable"
        f" (of {images['read']:,} read)",
    ]
    if captions["count"]:
        per_image = captions["per_image"]
        least, most = min(per_image), max(per_image)
        mean = f"{captions['count'] / stats['usable']:.1f} an image ({least} to {most})"
        repeated = 1 - captions["distinct"] / captions["count"]
        lines.append(
            f"  captions  {captions['count']:,}, {f'{least} an image' if least == most else mean}, "
            f"{repeated:.1%} repeat another"
        )
    if tokens is not None:
        lines.append(
            f"  tokens    p50 {tokens['p50']}, p95 {tokens['p95']}, max {tokens['max']} of {tokens['context_length']}; "
            f"{tokens['cut']:,} captions are cut"
        )
    elif captions["count"]:
        lines.append("  tokens    not counted: no tokenizer.json beside the shards, give --tokenizer")
    skipped = ", ".join(f"{cause} {count:,}" for cause, count in stats["skipped"].items())
    return "\n".join([*lines, f"  skipped   {skipped or 'nothing'}"])


def _counts(counts: dict[str, int]) -> str:
    """`PNG 990, JPEG 10`; the first few where there are many."""
    shown = [f"{name} ({count:,})" if len(counts) > 1 else name for name, count in counts.items()][:SIZES_SHOWN]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more:,} others" if more else "") or "none"
