"""Write the embedded data set: rendered scenes and real digits, as shards that any real run reads."""

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastclip.data.demo.captions import NUMBER_WORDS, ZERO_SHOT_TEMPLATES, digit_captions, scene_captions
from fastclip.data.demo.digits import enlarge, load_digits, split_digits
from fastclip.data.demo.render import render_scene
from fastclip.data.demo.scenes import HeldOut, Object, Scene, held_out_scenes, train_scene
from fastclip.data.shards import index_path, write_shard
from fastclip.data.streams import Stream, permutation
from fastclip.data.tokenizer import train_tokenizer

GENERATOR_VERSION = 1
DIGIT_SHARE = 0.12  # of the training part
SHARD_SIZE = 4096
CONTEXT_LENGTH = 32
VOCAB_SIZE = 1024

Files = dict[str, bytes]


@dataclass(frozen=True)
class Part:
    """One of the three parts of the data set: sample `number` is a pure function of (seed, number)."""

    name: str
    seed: int
    scenes: int

    def __len__(self) -> int:
        return len(self._order)

    @property
    def shards(self) -> int:
        """In how many files of about equal size the part is written."""
        return -(-len(self) // SHARD_SIZE)

    @cached_property
    def _held_out(self) -> list[HeldOut]:
        return held_out_scenes(self.seed)

    @cached_property
    def _held_out_contents(self) -> frozenset[tuple[Object, ...]]:
        return frozenset(held.scene.content for held in self._held_out)

    @cached_property
    def _digits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        images, labels = load_digits()
        train, test = split_digits(len(labels), self.seed)
        return images, labels, test if self.name == "digits_test" else train

    @cached_property
    def _order(self) -> np.ndarray:
        if self.name == "digits_test":
            return np.arange(len(self._digits[2]))
        if self.name == "scenes_test":
            return np.arange(len(self._held_out))
        digits = round(self.scenes * DIGIT_SHARE / (1 - DIGIT_SHARE))
        return permutation(self.scenes + digits, "mix", self.seed)

    def sample(self, number: int) -> tuple[str, Files]:
        """Key and files of sample `number`."""
        if self.name == "digits_test":
            return self._digit(number)
        if self.name == "scenes_test":
            held = self._held_out[number]
            return self._scene(number, held.scene, {"group": held.group, "kind": held.kind})
        number = int(self._order[number])
        if number < self.scenes:
            return self._scene(number, train_scene(self.seed, number, self._held_out_contents), {})
        return self._digit(number - self.scenes)

    def _scene(self, number: int, scene: Scene, extra: dict[str, Any]) -> tuple[str, Files]:
        key = f"{self.name}-scene-{number:06d}"
        stream = Stream(self.seed, key)
        captions = scene_captions(scene, stream)
        meta = {
            "source": "scenes",
            "objects": [asdict(item) for item in scene.objects],
            "background": scene.background,
            "captions": captions[:1] if self.name == "scenes_test" else captions,
        }
        return key, _files(render_scene(scene, stream), meta | extra)

    def _digit(self, number: int) -> tuple[str, Files]:
        images, labels, chosen = self._digits
        turn, place = divmod(number, len(chosen))
        label = int(labels[chosen[place]])
        key = f"{self.name}-digit-{number:06d}"
        stream = Stream(self.seed, key)
        meta = {"source": "digits", "label": label, "number": int(chosen[place]), "objects": []}
        image = enlarge(images[chosen[place]], stream if turn else None)
        return key, _files(image, meta | {"captions": digit_captions(label, stream)})


def _files(pixels: np.ndarray, meta: dict[str, Any]) -> Files:
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG", compress_level=1)
    return {"png": png.getvalue(), "txt": meta["captions"][0].encode(), "json": json.dumps(meta).encode()}


def _write(job: tuple[Part, str, int]) -> tuple[str, list[str]]:
    """Write one shard; returns its name and the captions in it."""
    part, directory, shard = job
    shards = part.shards
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
    parts = [Part(name, seed, scenes) for name in ("train", "digits_test", "scenes_test")]
    for part in parts:
        for stale in directory.glob(f"{part.name}-?????.tar"):
            stale.unlink()
            Path(index_path(stale)).unlink(missing_ok=True)
    jobs = [(part, os.fspath(directory), shard) for part in parts for shard in range(part.shards)]
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
