"""`fastclip data demo`: the embedded data set on disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.cli.options import parse


@dataclass(frozen=True)
class Demo:
    """Write the embedded data set: rendered scenes and real handwritten digits.

    Needs no network. A data set that is there already and whole is left alone.

    Example: fastclip data demo data/demo
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder to write shards, tokenizer and manifest into; made where it is missing."""
    scenes: int = 40_000
    """Rendered scenes to train on; digits and the held-out sets come on top."""
    seed: int = 0
    """Of everything that is drawn: the same seed gives the same bytes."""
    workers: int = 2
    """Processes that render."""


def main(arguments: Sequence[str]) -> None:
    """See `Demo`."""
    options = parse(Demo, "data demo", arguments)
    from fastclip.data.demo import write_demo

    before = _written_at(options.directory)
    print(f"Embedded data set: {options.scenes:,} scenes, seed {options.seed}, into {options.directory}", flush=True)
    start = time.monotonic()
    manifest = write_demo(options.directory, options.scenes, options.seed, options.workers)
    seconds = time.monotonic() - start
    was_there = _written_at(options.directory) == before
    what = "was there already and is whole" if was_there else f"written in {seconds:.0f} s"
    counts = ", ".join(f"{name} {count:,}" for name, count in manifest["counts"].items())
    print(f"{counts}: {what}")


def _written_at(directory: Path) -> int | None:
    """When the manifest was written, in ns; None where there is none."""
    manifest = directory / "manifest.json"
    return manifest.stat().st_mtime_ns if manifest.is_file() else None
