"""A search index on disk: made in parts that a second call goes on from, opened in a moment, asked by features.

<index>/index.json     the model's fingerprint, what was indexed, how it is searched; written last
        items.sqlite   items(id, key, caption, metadata), captions(id, item, text)
        images/ images.faiss, captions/ captions.faiss   see `vectors`
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastclip.errors import UserError
from fastclip.evaluation.collection import Readable, open_collection
from fastclip.evaluation.encoder import Encoder
from fastclip.evaluation.vectors import Vectors

VERSION = 2
PART = 4096  # images a part: what is done again after an interruption
QUERIES = 256  # captions that the search is measured with
Progress = Callable[[Iterable[int]], Iterable[int]]

_TABLES = """
CREATE TABLE IF NOT EXISTS items (id INTEGER PRIMARY KEY, key TEXT, caption TEXT, metadata TEXT);
CREATE TABLE IF NOT EXISTS captions (id INTEGER PRIMARY KEY, item INTEGER, text TEXT);
"""
_CONDITION = re.compile(r"([\w.-]+)(!=|=)(.*)", re.DOTALL)


class Found(NamedTuple):
    """An image (or one of its captions) and its cosine."""

    number: int
    score: float
    key: str
    caption: str
    metadata: dict[str, Any]


def weights_fingerprint(checkpoint: Path) -> str:
    """SHA-256 of the file of weights that a step folder or a file stands for."""
    file = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(opened)


def _digest(opened: Any) -> str:
    digest = hashlib.sha256()
    while block := opened.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def build_index(
    encoder: Encoder,
    paths: Sequence[str],
    out: Path,
    *,
    model: str,
    checkpoint: str = "",
    with_captions: bool = False,
    progress: Progress = iter,
) -> dict[str, Any]:
    """Encodes all images (and captions) of `paths` into `out` and returns what index.json holds.

    Parts that are there already are kept, so an interrupted call is finished by the same call.

    Args:
        model: fingerprint of the weights, see `weights_fingerprint`.
        checkpoint: where the weights lie, for the verbs that open the index.
        progress: shows the numbers of parts as they are done, such as tqdm.

    Errors: `UserError` for a folder that holds an index of another model or of other images.
    """
    collection = open_collection(paths)
    plan: dict[str, Any] = {
        "version": VERSION,
        "model": model,
        "paths": [os.path.abspath(path) for path in paths],
        "images": len(collection),
        "with_captions": with_captions,
        "embed_dim": encoder.config.embed_dim,
    }
    _claim(out, plan)
    images, captions = Vectors(out / "images"), Vectors(out / "captions")
    connection = sqlite3.connect(out / "items.sqlite")
    connection.executescript(_TABLES)
    parts = -(-len(collection) // PART)
    for part in progress(range(images.parts, parts)):
        start, stop = part * PART, min((part + 1) * PART, len(collection))
        source = Readable(collection, start, stop, encoder.config.vision.image_size)
        features = encoder.images(source)
        features[[number - start for number in source.broken]] = 0  # stands for nothing
        items = [collection.item(number) for number in range(start, stop)]
        first = connection.execute("SELECT count(*) FROM captions WHERE item < ?", (start,)).fetchone()[0]
        texts = [(number, text) for number, item in enumerate(items, start) for text in item.captions]
        with connection:  # what an interrupted call left of this part is replaced
            connection.execute("DELETE FROM captions WHERE item >= ?", (start,))
            connection.executemany(
                "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?)",
                (
                    (number, item.key, next(iter(item.captions), ""), json.dumps(item.metadata))
                    for number, item in enumerate(items, start)
                ),
            )
            if with_captions:
                connection.executemany(
                    "INSERT INTO captions VALUES (?, ?, ?)",
                    ((first + n, item, text) for n, (item, text) in enumerate(texts)),
                )
        if with_captions and captions.parts == part:
            captions.append(
                encoder.texts([text for _, text in texts]) if texts else torch.empty(0, encoder.config.embed_dim)
            )
        images.append(features)  # last: with it the part is done
    queries = connection.execute("SELECT caption FROM items WHERE caption != '' LIMIT ?", (QUERIES,)).fetchall()
    asked = encoder.texts([text for (text,) in queries]) if queries and len(images) else None
    how = {"images": images.build(asked)} | ({"captions": captions.build()} if with_captions else {})
    done = plan | {"checkpoint": checkpoint, "search": how}
    connection.close()
    _write(out / "index.json", done)
    (out / "plan.json").unlink(missing_ok=True)
    return done


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Makes `out` the place of this index, or raises where it is another's."""
    out.mkdir(parents=True, exist_ok=True)
    for path in (out / "index.json", out / "plan.json"):
        if path.is_file():
            held = _read(path)
            differs = [name for name in plan if held.get(name) != plan[name]]
            if differs:
                raise UserError(
                    f"{out} holds an index with another {', '.join(differs)}: choose another folder, or delete this one"
                )
            return
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no index: choose another folder")
    _write(out / "plan.json", plan)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): make the index anew") from error


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


class Index:
    """An index that `build_index` finished. May be asked from several threads.

    Errors: `UserError` for a folder without one, or one that another version wrote.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "index.json"
        if not path.is_file():
            if (folder / "plan.json").is_file():
                raise UserError(f"{folder} holds an unfinished index: run the same fastclip index again to finish it")
            raise UserError(f"{folder} holds no index: fastclip index makes one")
        self.about = _read(path)
        if self.about.get("version") != VERSION:
            raise UserError(f"{folder} is an index of version {self.about.get('version')}, this reads {VERSION} only")
        self.images, self.captions = Vectors(folder / "images"), Vectors(folder / "captions")
        self.images.open_index(self.about["search"]["images"]["looked_into"])
        if self.about["with_captions"]:
            self.captions.open_index(self.about["search"]["captions"]["looked_into"])
        if len(self.images) != self.about["images"]:
            raise UserError(
                f"{folder} has {len(self.images)} of {self.about['images']} images: run fastclip index again"
            )
        self._connection = sqlite3.connect(f"file:{folder / 'items.sqlite'}?mode=ro", uri=True, check_same_thread=False)
        self._lock = threading.Lock()
        self._collection = open_collection(self.about["paths"])
        if len(self._collection) != len(self.images):
            raise UserError(f"what {folder} was made of has changed: make the index anew")

    def __len__(self) -> int:
        return len(self.images)

    def check_model(self, model: str, checkpoint: object) -> None:
        """Raises `UserError` unless `model` is the fingerprint of the weights that the index was made with."""
        if model != self.about["model"]:
            made = self.about["checkpoint"] or "other weights"
            raise UserError(
                f"the index was made with {made} ({self.about['model'][:12]}...), not with {checkpoint} "
                f"({model[:12]}...): features of two models cannot be compared; give that one or make a new index"
            )

    def find_images(self, query: Tensor, k: int, where: Sequence[str] = ()) -> list[Found]:
        """The k images nearest to `query` (D,) of unit length, among those whose metadata are as `where` says."""
        scores, numbers = self.images.nearest(query[None], k, self._matching(where) if where else None)
        return [self._found(number, score) for score, number in zip(scores[0], numbers[0], strict=True)]

    def find_captions(self, query: Tensor, k: int) -> list[Found]:
        """The k different captions nearest to `query` (D,) of unit length, each with its image."""
        if not self.about["with_captions"]:
            raise UserError("the index holds no captions: make it with fastclip index --captions")
        found: dict[str, Found] = {}
        asked = k
        while True:  # a caption may stand beside many images
            scores, numbers = self.captions.nearest(query[None], asked)
            for score, number in zip(scores[0], numbers[0], strict=True):
                item, text = self._rows("SELECT item, text FROM captions WHERE id = ?", (number,))[0]
                found.setdefault(text, self._found(item, score)._replace(caption=text))
            if len(found) >= k or asked >= len(self.captions):
                return list(found.values())[:k]
            asked = min(4 * asked, len(self.captions))

    def image_file(self, number: int) -> bytes:
        """The file of image `number`. Errors: `ValueError` for a number that is none."""
        if not 0 <= number < len(self):
            raise ValueError(f"there are images 0 to {len(self) - 1}, {number} was asked for")
        with self._lock:
            return self._collection.image_file(number)

    def _found(self, number: int, score: float) -> Found:
        key, caption, metadata = self._rows("SELECT key, caption, metadata FROM items WHERE id = ?", (number,))[0]
        return Found(number, score, key, caption, json.loads(metadata))

    def _matching(self, where: Sequence[str]) -> np.ndarray:
        """Numbers of the images that fulfil all conditions, each `field=value` or `field!=value`."""
        clauses, values = [], list[str]()
        for condition in where:
            match = _CONDITION.fullmatch(condition)
            if match is None:
                raise UserError(f"a filter must be field=value or field!=value, was {condition!r}")
            field, sign, value = match.groups()
            clauses.append(f"coalesce(CAST(json_extract(metadata, ?) AS TEXT), '') {sign} ?")
            values += [f'$."{field}"', value]
        rows = self._rows(f"SELECT id FROM items WHERE {' AND '.join(clauses)}", values)
        return np.array([number for (number,) in rows], dtype=np.int64)

    def _rows(self, query: str, values: Sequence[Any]) -> list[Any]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()
