"""What is indexed: the images of shards or of a folder, with the captions and metadata that they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.data.eval_set import eval_batch
from fastclip.data.loader import BrokenSample, captions_of
from fastclip.data.shards import IMAGE_SUFFIXES, ShardIndex
from fastclip.errors import UserError


class Item(NamedTuple):
    """What is known of an image beside its pixels."""

    key: str
    captions: list[str]
    metadata: dict[str, Any]


class ShardCollection:
    """All images of some shards."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._index = ShardIndex(paths)

    def __len__(self) -> int:
        return len(self._index)

    def item(self, number: int) -> Item:
        """Key, captions and the fields of its JSON."""
        sample = self._index.read(number)
        try:
            captions = captions_of(sample)
        except BrokenSample:
            captions = []
        metadata = {name: value for name, value in sample.meta.items() if name != "captions"}
        return Item(sample.key, captions, metadata | {"shard": Path(self._index.path(number)).name})

    def image_file(self, number: int) -> bytes:
        """The file of image `number`."""
        return self._index.read(number).image


class FolderCollection:
    """All image files below a folder, in the order of their names; links are not followed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        found = (path for path in sorted(self._folder.rglob("*")) if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
        self._files = [path for path in found if path.is_file() and not path.is_symlink()]
        if not self._files:
            raise UserError(f"{folder} holds no *.tar shard and no {', '.join(IMAGE_SUFFIXES)} file")

    def __len__(self) -> int:
        return len(self._files)

    def item(self, number: int) -> Item:
        """Its path below the folder, the text of a .txt file of the same name, and the folder it lies in."""
        path = self._files[number]
        text = path.with_suffix(".txt")
        captions = [line.strip() for line in text.read_text("utf-8", "replace").splitlines()] if text.is_file() else []
        relative = path.relative_to(self._folder)
        return Item(str(relative), [line for line in captions if line], {"folder": str(relative.parent)})

    def image_file(self, number: int) -> bytes:
        """The file of image `number`."""
        return self._files[number].read_bytes()


Collection = ShardCollection | FolderCollection


def open_collection(paths: Sequence[str]) -> Collection:
    """Shards (files, patterns, a folder with *.tar) or a folder of image files."""
    if len(paths) == 1 and Path(paths[0]).is_dir() and not any(Path(paths[0]).glob("*.tar")):
        return FolderCollection(Path(paths[0]))
    return ShardCollection(paths)


class Readable:
    """Images start..stop - 1 of a collection as an `ImageSource`; `broken`: which could not be decoded."""

    def __init__(self, collection: Collection, start: int, stop: int, image_size: int) -> None:
        self._collection, self._start, self._image_size = collection, start, image_size
        self.keys = [""] * (stop - start)
        self.skipped: Counter[str] = Counter()
        self.broken: list[int] = []

    def __len__(self) -> int:
        return len(self.keys)

    def images(self, start: int, stop: int) -> Tensor:
        """See `ImageSource`."""
        rows = []
        for number in range(self._start + start, self._start + stop):
            before = self.skipped.total()
            rows.append(eval_batch([number], self._collection.image_file, self._image_size, self.skipped))
            if self.skipped.total() > before:
                self.broken.append(number)
        return torch.cat(rows)

    def image_file(self, number: int) -> bytes:
        """See `ImageSource`."""
        return self._collection.image_file(self._start + number)
