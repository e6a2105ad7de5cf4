"""Samples of tar files with any members, such as CLIP_benchmark's `key.webp` and `key.cls`, read by their place."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastclip.data.shards import MAX_MEMBER_BYTES
from fastclip.errors import UserError


class TarMembers:
    """The samples of some tars in their order; `keys[i]` is the name of sample i without its suffix."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.keys: list[str] = []
        self._places: list[dict[str, tuple[int, int, int]]] = []  # suffix -> (file, offset, size)
        self._paths, self._files = list(paths), dict[int, int]()
        for number, path in enumerate(self._paths):
            if not path.is_file():
                raise UserError(f"{path} is missing: nshards.txt promises {len(self._paths)} shards, 0.tar and so on")
            self._scan(number, path)

    def _scan(self, number: int, path: Path) -> None:
        samples: dict[str, dict[str, tuple[int, int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.isfile() and 0 <= member.size <= MAX_MEMBER_BYTES:
                        _, dot, suffix = member.name.rpartition("/")[2].partition(".")
                        key = member.name.removesuffix(dot + suffix)
                        samples.setdefault(key, {})[suffix.lower()] = (number, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise UserError(f"{path} is no tar file, or is damaged: {error}") from error
        self.keys += samples
        self._places += samples.values()

    def __len__(self) -> int:
        return len(self.keys)

    def has(self, number: int, one_of: Sequence[str], also: str) -> bool:
        """Whether sample `number` has a member with one of the suffixes and one with the suffix `also`."""
        return also in self._places[number] and any(suffix in self._places[number] for suffix in one_of)

    def read(self, number: int, one_of: Sequence[str]) -> bytes:
        """The first member of sample `number` with one of the suffixes."""
        place, offset, size = next(self._places[number][suffix] for suffix in one_of if suffix in self._places[number])
        if place not in self._files:
            self._files[place] = os.open(self._paths[place], os.O_RDONLY)
        return os.pread(self._files[place], size, offset)

    def label(self, number: int, suffix: str) -> Tensor:
        """The int64 class in a `.cls` member, or the bool (classes,) in a `.npy` one."""
        content = self.read(number, (suffix,))
        try:
            if suffix == "npy":
                return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False).astype(bool))
            return torch.tensor(int(content))
        except (ValueError, EOFError, OverflowError) as error:
            raise UserError(f"{self.keys[number]}.{suffix} in {self._paths[0].parent} is no label: {error}") from error

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)
