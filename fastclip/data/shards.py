"""Shards: plain tar files in img2dataset's (WebDataset's) layout, one `key.png|jpg`, `key.txt`, `key.json` per sample.

Nothing is ever unpacked. A shard is scanned once for the places of its members, after which any sample is a few
`os.pread` calls away: a loader that knows places can shuffle all samples, resume anywhere and use more workers than
there are shards. The scan is kept beside the shard (`x.tar.index.npz`) by `write_shard`, and believed while the shard's
size and time are the same.
"""

import io
import itertools
import json
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from glob import escape, glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ShardSpec = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp")
MAX_MEMBER_BYTES = 256 << 20

_INDEX_VERSION = 1
_OPEN_FILES = 256
_ABSENT = (-1, 0)
_KINDS = {"txt": 1, "json": 2} | dict.fromkeys(IMAGE_SUFFIXES, 0)
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
    _scan(os.fspath(path)).save(index_path(path))


def index_path(shard: str | os.PathLike[str]) -> str:
    """Where the scan of `shard` is kept."""
    return os.fspath(shard) + ".index.npz"


class _Scan(NamedTuple):
    """Where the samples of one shard lie. `places[i, kind]` is (offset, size), (-1, 0) where there is no such member;
    kinds: 0 image, 1 txt, 2 json. `stamp` is (version, bytes, mtime in ns) of the shard."""

    keys: np.ndarray  # bytes (n,)
    places: np.ndarray  # int64 (n, 3, 2)
    skipped: Counter[str]
    stamp: tuple[int, int, int]

    def save(self, path: str) -> None:
        temporary = f"{path}.{os.getpid()}.tmp"
        with open(temporary, "wb") as file:
            counts = np.array(json.dumps(self.skipped))
            np.savez(file, keys=self.keys, places=self.places, skipped=counts, stamp=np.array(self.stamp))
        os.replace(temporary, path)


def _stamp(shard: str) -> tuple[int, int, int]:
    status = os.stat(shard)
    return _INDEX_VERSION, status.st_size, status.st_mtime_ns


def _load_scan(shard: str) -> _Scan | None:
    """The scan kept beside the shard, or None where there is none that fits."""
    try:
        with np.load(index_path(shard), allow_pickle=False) as kept:
            scan = _Scan(kept["keys"], kept["places"], Counter(json.loads(str(kept["skipped"]))), tuple(kept["stamp"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    fits = scan.stamp == _stamp(shard) and scan.places.shape == (len(scan.keys), 3, 2)
    return scan if fits and (scan.places >= _ABSENT).all() else None


def _split_name(name: str) -> tuple[str, str]:
    """Key and suffix: the base name is cut at its first dot."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def _scan(shard: str) -> _Scan:
    """Read the headers of one tar. Members that are not plain files or whose names climb are ignored; of a truncated or
    damaged tar the part before the damage is used. All of it is counted."""
    stamp = _stamp(shard)
    length = stamp[1]
    samples: dict[str, list[tuple[int, int]]] = {}
    skipped: Counter[str] = Counter()
    try:
        with tarfile.open(shard, "r:") as tar:
            last = -1
            for member in tar:
                if member.size < 0 or member.offset_data <= last:  # older tarfile versions go round in circles
                    raise tarfile.ReadError("header points backwards")
                last = member.offset_data
                key, suffix = _split_name(member.name)
                unsafe = member.name.startswith("/") or ".." in member.name.split("/")
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or unsafe or not key:
                    skipped["ignored_member"] += not member.isdir()
                elif member.size > MAX_MEMBER_BYTES:
                    skipped["oversized_member"] += 1
                elif suffix in _KINDS and last + member.size <= length:
                    samples.setdefault(key, [_ABSENT] * 3)[_KINDS[suffix]] = (last, member.size)
            end = tar.offset
        with open(shard, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("no header where one should be")
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        skipped["truncated_shard" if samples else "unreadable_shard"] += 1
    whole = {key: places for key, places in samples.items() if places[0] != _ABSENT}
    skipped["missing_image"] += len(samples) - len(whole)
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in whole], dtype=np.bytes_)
    places = np.array(list(whole.values()), dtype=np.int64).reshape(-1, 3, 2)
    return _Scan(keys, places, +skipped, stamp)


class Sample(NamedTuple):
    """What a shard holds of one sample; `text` is None and `meta` empty where there is no such member."""

    key: str
    image: bytes
    text: str | None
    meta: dict[str, Any]


class ShardIndex:
    """All samples of some shards, by number. Holds places only; `len(index)` samples, `index.read(i)` reads one.

    `index.skipped` counts by cause what the scan left out: ignored_member, oversized_member, missing_image,
    truncated_shard (its first part is used), unreadable_shard. Files are opened when first read, in any process.
    Errors: those of `expand_shards`; `ValueError` where no shard holds an image.
    """

    def __init__(self, shards: ShardSpec, split: str | None = None) -> None:
        self.paths = expand_shards(shards, split)
        scans = [_load_scan(path) or _scan(path) for path in self.paths]
        self.skipped = sum((scan.skipped for scan in scans), Counter[str]())
        self._shard = np.repeat(np.arange(len(scans)), [len(scan.keys) for scan in scans])
        self._keys = np.concatenate([scan.keys for scan in scans])
        self._places = np.concatenate([scan.places for scan in scans])
        self._files: dict[int, int] = {}
        if not len(self):
            raise ValueError(
                f"shards: no sample in {len(self.paths)} file(s), the first is {self.paths[0]!r}, left out: "
                f"{dict(self.skipped)}; a shard is an uncompressed tar of key.png|jpg, key.txt and key.json members"
            )

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, number: int) -> str:
        """The key of sample `number`."""
        return self._keys[number].decode("utf-8", "surrogateescape")

    def path(self, number: int) -> str:
        """The shard that holds sample `number`."""
        return self.paths[self._shard[number]]

    def read(self, number: int) -> Sample:
        """Read sample `number`. A member that is not there any more comes back shorter, JSON that is none as {}."""
        file = self._open(int(self._shard[number]))
        image, text, meta = (
            os.pread(file, size, offset) if offset >= 0 else None for offset, size in self._places[number].tolist()
        )
        return Sample(
            self.key(number), image or b"", None if text is None else text.decode("utf-8", "replace"), _parse(meta)
        )

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


def _parse(meta: bytes | None) -> dict[str, Any]:
    try:
        parsed = json.loads(meta or b"{}")
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
