"""What the tests of the data room share: tiny images, tiny shards, a tiny tokenizer."""

from __future__ import annotations

import io
import json
import os
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastclip.data import Loader, Tokenizer, train_tokenizer, write_shard
from fastclip.data.loader import Batch

WORDS = ("red", "green", "blue", "circle", "square", "on", "a", "table")


def examples(count: int) -> int:
    """How many examples a property is tried on; tests/fuzz_data.py asks for more."""
    return count * int(os.environ.get("TIMES_THE_EXAMPLES", "1"))


def image_file(number: int, size: tuple[int, int] = (8, 8), mode: str = "RGB", form: str = "PNG") -> bytes:
    """A small image whose pixels depend on `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, form)
    return out.getvalue()


def sample(number: int, **replaced: bytes | None) -> tuple[str, dict[str, bytes]]:
    """Sample `number` as a shard holds it, three captions in its JSON; `replaced` members: others, or None for none."""
    captions = [f"{WORDS[number % 3]} {WORDS[3 + number % 2]} on a table {number} {turn}" for turn in range(3)]
    files: dict[str, bytes | None] = {
        "png": image_file(number),
        "txt": captions[0].encode(),
        "json": json.dumps({"captions": captions, "label": number % 3}).encode(),
    }
    kept = {suffix: content for suffix, content in (files | replaced).items() if content is not None}
    return f"{number:04d}", kept


def write_samples(directory: Path, count: int, shards: int = 3, **broken: Any) -> Path:
    """`count` samples spread over `shards` files in `directory`; `broken` maps "s<number>" to replaced members."""
    directory.mkdir(exist_ok=True)
    for shard in range(shards):
        numbers = range(shard, count, shards)
        write_shard(directory / f"train-{shard:05d}.tar", [sample(n, **broken.get(f"s{n}", {})) for n in numbers])
    return directory


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    """One more member, of any kind."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(content)
    tar.addfile(member, io.BytesIO(content))


def small_tokenizer(directory: Path, context_length: int = 16) -> Tokenizer:
    """A tokenizer that knows WORDS."""
    return train_tokenizer([" ".join(WORDS)] * 3, directory / "tokenizer.json", 600, context_length)


def take(loader: Loader, count: int, start: int = 0) -> list[Batch]:
    """Batches from step `start` on."""
    batches = loader.batches(start)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()
