"""A nested state of tensors in a file that stays mapped into memory: writing it again is a copy, and no more.

PATH holds the tensors' bytes, PATH.index the rest of the state with each tensor's place.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PLACE, _ALIGNED = "place of a tensor", 64
_DEEPER = object()


class MappedWriter:
    """Called as `torch.save`; keeps its files mapped. What the kernel has it keeps when the process dies."""

    def __init__(self) -> None:
        self._maps: dict[Path, Tensor] = {}

    def __call__(self, state: Any, path: str | Path) -> None:
        """Raises OSError where there is no room; a file that is full when it is written to would end the process."""
        path, tensors, size = Path(path), [], 0

        def place(value: Any) -> Any:
            nonlocal size
            if not isinstance(value, Tensor):
                return _DEEPER
            data = value.detach().contiguous().reshape(-1).view(torch.uint8)
            tensors.append((size, data))
            found = (_PLACE, size, list(value.shape), str(value.dtype).removeprefix("torch."))
            size += -(-len(data) // _ALIGNED) * _ALIGNED
            return found

        index = _changed(state, place)
        try:
            torch.save(index, _index(path))
        except RuntimeError as error:  # its own for a disk that is full
            raise OSError(f"{_index(path)}: {error}") from error
        mapped = self._mapped(path, size)
        for start, data in tensors:
            mapped[start : start + len(data)].copy_(data)

    def _mapped(self, path: Path, size: int) -> Tensor:
        if path not in self._maps or len(self._maps[path]) != size:
            if not path.is_file() or path.stat().st_size != size:
                path.unlink(missing_ok=True)
                descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
                try:
                    if size:
                        os.posix_fallocate(descriptor, 0, size)
                finally:
                    os.close(descriptor)
            self._maps[path] = _map(path, size, is_shared=True)
        return self._maps[path]


def read_mapped(path: str | Path, load: Callable[..., Any] = torch.load, **options: Any) -> Any:
    """What `MappedWriter` wrote, on the CPU. `load` and its options read the index."""
    path = Path(path)
    mapped = _map(path, path.stat().st_size, is_shared=False)

    def tensor(value: Any) -> Any:
        if not (isinstance(value, tuple) and value[:1] == (_PLACE,)):
            return _DEEPER
        _, start, shape, name = value
        dtype = getattr(torch, name)
        count = int(torch.Size(shape).numel()) * dtype.itemsize
        return mapped[start : start + count].clone().view(dtype).reshape(shape)

    return _changed(load(_index(path), **options), tensor)


def _changed(state: Any, change: Callable[[Any], Any]) -> Any:
    """The state with what `change` makes of each part, or of the parts within it where that is _DEEPER."""
    changed = change(state)
    if changed is not _DEEPER:
        return changed
    if type(state) in (dict, OrderedDict):
        return type(state)((key, _changed(value, change)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(_changed(value, change) for value in state)
    return state


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.index")


def _map(path: Path, size: int, is_shared: bool) -> Tensor:
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(os.fspath(path), shared=is_shared, size=size, dtype=torch.uint8)
