"""Write the embedded data set: rendered scenes and real digits, as shards that any real run reads."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from fastclip.data.demo.captions import NUMBER_WORDS, ZERO_SHOT_TEMPLATES
from fastclip.data.demo.samples import PARTS, Files, Part
from fastclip.data.shards import index_path, write_shard
from fastclip.data.tokenizer import train_tokenizer

GENERATOR_VERSION = 1
SHARD_SIZE = 4096
CONTEXT_LENGTH = 32
VOCAB_SIZE = 1024


def _shards(part: Part) -> int:
    """In how many files of about equal size `part` is written."""
    return -(-len(part) // SHARD_SIZE)


def _write(job: tuple[Part, str, int]) -> tuple[str, list[str]]:
    """Write one shard; returns its name and the captions in it."""
    part, directory, shard = job
    shards = _shards(part)
    numbers = range(len(part) * shard // shards, len(part) * (shard + 1) // shards)
    captions: list[str] = []

    def samples() -> Iterator[tuple[str, Files]]:
        for number in numbers:
            key, files = part.sample(number)
            captions.extend(json.loads(files["json"])["captions"])
            yield key, files

    name = f"{part.name}-{shard:05d}.tar"
    write_shard(os.path.join(directory, name), samples())
    return name, captions


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_whole(directory: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, if it is of `wanted` and every file is as it says."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        same = {key: manifest[key] for key in wanted} == wanted
        if same and all(_sha256(directory / name) == digest for name, digest in manifest["sha256"].items()):
            return manifest
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    return None


def write_demo(
    directory: str | os.PathLike[str], scenes: int = 40_000, seed: int = 0, workers: int = 2
) -> dict[str, Any]:
    """Write the embedded data set into `directory` and return its manifest; nothing is done where it is there already.

    `{train,digits_test,scenes_test}-%05d.tar`: `scenes` training scenes mixed with digits (12 %), 360 held-out digits,
    1,000 held-out scenes. `tokenizer.json`: trained on the training captions. `digits_test.classes.json`: class names
    and prompt templates. `manifest.json`: generator version, arguments, counts, SHA-256 of every file; written last.
    The content depends on (scenes, seed) only. Errors: `ValueError` for a number below 1 or a directory that
    is a file.
    """
    for name, value in (("scenes", scenes), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, was {value}")
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: must be a directory, {os.fspath(directory)!r} is a file")
    wanted = {"generator_version": GENERATOR_VERSION, "scenes": scenes, "seed": seed}
    if manifest := _is_whole(directory, wanted):
        return manifest
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").unlink(missing_ok=True)
    parts = [Part(name, seed, scenes) for name in PARTS]
    for part in parts:
        for stale in directory.glob(f"{part.name}-?????.tar"):
            stale.unlink()
            Path(index_path(stale)).unlink(missing_ok=True)
    jobs = [(part, os.fspath(directory), shard) for part in parts for shard in range(_shards(part))]
    if workers == 1:
        written = [_write(job) for job in jobs]
    else:
        context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            written = list(pool.map(_write, jobs))

    captions = [caption for name, some in written if name.startswith("train-") for caption in some]
    train_tokenizer(captions, directory / "tokenizer.json", vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH)
    classes = {"classnames": NUMBER_WORDS, "templates": ZERO_SHOT_TEMPLATES}
    (directory / "digits_test.classes.json").write_text(json.dumps(classes, indent=1) + "\n")
    names = [name for name, _ in written] + ["tokenizer.json", "digits_test.classes.json"]
    manifest = wanted | {
        "counts": {part.name: len(part) for part in parts},
        "sha256": {name: _sha256(directory / name) for name in names},
    }
    temporary = directory / ".manifest.json.tmp"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(temporary, directory / "manifest.json")
    return manifest
