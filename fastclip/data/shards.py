"""Shards: plain tar files in img2dataset's (WebDataset's) layout, one `key.png|jpg`, `key.txt`, `key.json` per sample.

Nothing is ever unpacked. A shard is scanned once for the places of its members, after which any sample is a few
`os.pread` calls away: a loader that knows places can shuffle all samples, resume anywhere and use more workers than
there are shards. The scan is kept beside the shard (`x.tar.index.npz`) by `write_shard`, and believed while the shard's
size and time are the same.
"""

import io
import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from glob import escape, glob
from pathlib import Path
from typing import Any

import numpy as np

from fastclip.data.scan import IMAGE_SUFFIXES, Sample, index_path, scan_of, scan_shard
from fastclip.data.tar import MAX_MEMBER_BYTES

ShardSpec = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

__all__ = ["IMAGE_SUFFIXES", "MAX_MEMBER_BYTES", "Sample", "ShardIndex", "expand_shards", "index_path", "write_shard"]

_OPEN_FILES = 256
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(pattern: str) -> list[str]:
    """`x/{000..002}.tar` and `{a,b}.tar` written out, as a shell does it; zeros in front are kept."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    body = match[1]
    if span := _RANGE.fullmatch(body):
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise ValueError(f"shards: the range {{{body}}} in {pattern!r} runs backwards; write the smaller end first")
        choices = [str(n).zfill(len(span[1])) for n in range(first, last + 1)]
    else:
        choices = body.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return list(itertools.chain.from_iterable(expand_braces(head + choice + tail) for choice in choices))


def expand_shards(spec: ShardSpec, split: str | None = None) -> list[str]:
    """The shard files that `spec` means: a file, a directory, a glob, a brace range, or a list of these.

    A directory stands for its `<split>-*.tar` if `split` is given and it has some, else for all its `*.tar`.
    Errors: `FileNotFoundError` for a file that is not there, `ValueError` where nothing is left to read.
    """
    parts = [spec] if isinstance(spec, (str, os.PathLike)) else list(spec)
    found: list[str] = []
    for part in parts:
        for name in expand_braces(os.fspath(part)):
            if os.path.isdir(name):
                inside = sorted(glob(os.path.join(escape(name), "*.tar")))
                chosen = [path for path in inside if split and os.path.basename(path).startswith(f"{split}-")]
                if not inside:
                    raise ValueError(f"shards: the directory {name!r} holds no *.tar file")
                found += chosen or inside
            elif os.path.isfile(name):
                found.append(name)
            elif any(c in name for c in "*?["):
                matches = sorted(glob(name))
                if not matches:
                    raise FileNotFoundError(f"shards: no file matches {name!r}")
                found += matches
            else:
                raise FileNotFoundError(f"shards: {name!r} does not exist (from {os.fspath(part)!r})")
    if not found:
        raise ValueError(
            "shards: the list is empty; give a directory, a file, a glob or a range like x/{00000..00011}.tar"
        )
    return found


def write_shard(path: str | os.PathLike[str], samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write `(key, {suffix: content})` samples as one tar, under another name until it is whole.

    The same samples give the same bytes.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, files in samples:
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    scan_shard(os.fspath(path)).save(os.fspath(path))


class ShardIndex:
    """All samples of some shards, by number. Holds places only; `len(index)` samples, `index.read(i)` reads one.

    `index.skipped` counts by cause what the scans left out (see `tar` and `scan`). Files are opened when first read, in
    any process.
    Errors: those of `expand_shards`; `ValueError` where no shard holds an image.
    """

    def __init__(self, shards: ShardSpec, split: str | None = None) -> None:
        self.paths = expand_shards(shards, split)
        self.scans = [scan_of(path) for path in self.paths]
        self.skipped = sum((scan.skipped for scan in self.scans), Counter[str]())
        self._starts = np.cumsum([0] + [len(scan) for scan in self.scans])
        self._files: dict[int, int] = {}
        if not len(self):
            raise ValueError(
                f"shards: no sample in {len(self.paths)} file(s), the first is {self.paths[0]!r}, left out: "
                f"{dict(self.skipped)}; a shard is an uncompressed tar of key.png|jpg, key.txt and key.json members"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, number: int) -> tuple[int, int]:
        """Shard and number within it of sample `number`."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return shard, number - int(self._starts[shard])

    def key(self, number: int) -> str:
        """The key of sample `number`."""
        shard, number = self._place(number)
        return self.scans[shard].key(number)

    def path(self, number: int) -> str:
        """The shard that holds sample `number`."""
        return self.paths[self._place(number)[0]]

    def read(self, number: int) -> Sample:
        """Read sample `number`; what is wrong with it is its `fault`. JSON that is none comes back as {}."""
        shard, number = self._place(number)
        return self.scans[shard].read(self._open(shard), number)

    def _open(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            file = self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return file

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()
