"""Where the samples of one shard lie: scanned once, kept beside it (`x.tar.index.npz`), read by place ever after."""

import contextlib
import json
import os
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastclip.data.tar import plain_members

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp")
MAX_TEXT_BYTES = 1 << 20  # of a caption or a JSON
MAX_ARRAYS = 16  # kinds of stored arrays in a shard

_VERSION = 2
_ABSENT = (-1, 0)
_KINDS = ("image", "txt", "json")
_KIND_OF = {"txt": "txt", "json": "json"} | dict.fromkeys(IMAGE_SUFFIXES, "image")
_GAP = 64 << 10  # bytes between members that are read rather than skipped


@dataclass(frozen=True)
class Sample:
    """What a shard holds of one sample.

    `text` is None and `meta` empty where there is no such member; `fault` is the cause why the sample, as it was read,
    is not what it was written as ("invalid_utf8", "shrunk_shard"), else "". `arrays` are the `.npy` members by suffix.
    """

    key: str
    image: bytes
    text: str | None
    meta: dict[str, Any]
    arrays: dict[str, bytes] = field(default_factory=dict)
    fault: str = ""


@dataclass
class Scan:
    """The samples of one shard that have an image.

    `places[i, kind]` is (offset, size), (-1, 0) where there is no such member; `kinds`: image, txt, json and the
    suffixes of stored arrays. `stamp` is (version, bytes, mtime in ns) of the shard.
    """

    keys: np.ndarray  # bytes (n,)
    places: np.ndarray  # int64 (n, kinds, 2)
    kinds: tuple[str, ...]
    skipped: Counter[str]
    stamp: tuple[int, int, int]
    examples: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, number: int) -> str:
        """The key of sample `number`."""
        return self.keys[number].decode("utf-8", "surrogateescape")

    def read(self, file: int, number: int) -> Sample:
        """Sample `number` from the shard open as descriptor `file`: one read where its members lie together."""
        contents: dict[str, bytes] = {}
        there = [(kind, *place) for kind, place in zip(self.kinds, self.places[number].tolist(), strict=True)]
        there = [(kind, offset, size) for kind, offset, size in there if offset >= 0]
        first = min(offset for _, offset, _ in there)
        last = max(offset + size for _, offset, size in there)
        if last - first <= sum(size for _, _, size in there) + _GAP:
            content = os.pread(file, last - first, first)
            contents = {kind: content[offset - first : offset - first + size] for kind, offset, size in there}
        else:
            contents = {kind: os.pread(file, size, offset) for kind, offset, size in there}
        shrunk = any(len(contents[kind]) < size for kind, _, size in there)
        return make_sample(self.key(number), contents, "shrunk_shard" if shrunk else "")

    def without(self, broken: Mapping[int, str]) -> "Scan":
        """The same less some samples, by number, which are counted under their causes."""
        kept = np.setdiff1d(np.arange(len(self)), list(broken))
        skipped = self.skipped + Counter(broken.values())
        return Scan(self.keys[kept], self.places[kept], self.kinds, skipped, self.stamp, self.examples)

    def save(self, shard: str) -> None:
        """Keep the scan beside the shard."""
        path = index_path(shard)
        temporary = f"{path}.{os.getpid()}.tmp"
        with open(temporary, "wb") as file:
            notes = json.dumps({"skipped": self.skipped, "kinds": self.kinds, "examples": self.examples})
            np.savez(file, keys=self.keys, places=self.places, notes=np.array(notes), stamp=np.array(self.stamp))
        os.replace(temporary, path)


def make_sample(key: str, contents: dict[str, bytes], fault: str = "") -> Sample:
    """A sample of its members by kind."""
    text, raw = None, contents.get("txt")
    if raw is not None:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            fault = fault or "invalid_utf8"
    arrays = {kind: content for kind, content in contents.items() if kind not in _KINDS}
    return Sample(key, contents.get("image", b""), text, _parse(contents.get("json")), arrays, fault)


def index_path(shard: str | os.PathLike[str]) -> str:
    """Where the scan of `shard` is kept."""
    return os.fspath(shard) + ".index.npz"


def scan_of(shard: str, keep: bool = False) -> Scan:
    """The scan kept beside the shard if it fits, else a new one; `keep` saves that where the folder can be written."""
    kept = load_scan(shard)
    if kept is not None:
        return kept
    scan = scan_shard(shard)
    if keep:
        with contextlib.suppress(OSError):  # a read-only folder: the next process scans again
            scan.save(shard)
    return scan


def load_scan(shard: str) -> Scan | None:
    """The scan kept beside the shard, or None where there is none that fits."""
    try:
        with np.load(index_path(shard), allow_pickle=False) as kept:
            notes = json.loads(str(kept["notes"]))
            scan = Scan(
                kept["keys"],
                kept["places"],
                tuple(notes["kinds"]),
                Counter(notes["skipped"]),
                tuple(kept["stamp"].tolist()),
                notes["examples"],
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        return None
    fits = scan.stamp == _stamp(shard) and scan.places.shape == (len(scan.keys), len(scan.kinds), 2)
    is_sound = scan.keys.dtype.kind == "S" and scan.kinds[:3] == _KINDS
    return scan if fits and is_sound and (scan.places >= _ABSENT).all() else None


def scan_shard(shard: str) -> Scan:
    """Read the headers of one tar; what is left out is counted by cause (see `tar`, and duplicate_key: a second member
    of the same kind, of which the first is used; missing_image; oversized_member for texts too)."""
    stamp = _stamp(shard)
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    skipped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    kinds = list(_KINDS)
    file = os.open(shard, os.O_RDONLY)
    try:
        for name, offset, size in plain_members(file, stamp[1], skipped):
            key, suffix = split_name(name)
            kind = _KIND_OF.get(suffix, suffix if suffix.endswith("npy") else "")
            if not kind:
                continue
            if kind not in kinds:
                if len(kinds) - len(_KINDS) == MAX_ARRAYS:
                    continue
                kinds.append(kind)
            cause = ""
            if kind in ("txt", "json") and size > MAX_TEXT_BYTES:
                cause = "oversized_member"
            elif kind in samples.setdefault(key, {}):
                cause = "duplicate_key"
            if cause:
                skipped[cause] += 1
                examples.setdefault(cause, f"member {name!r} in {shard!r}")
            else:
                samples[key][kind] = (offset, size)
    finally:
        os.close(file)
    for key, members in samples.items():
        if "image" not in members:
            skipped["missing_image"] += 1
            examples.setdefault("missing_image", f"sample {key!r} in {shard!r}")
    whole = {key: members for key, members in samples.items() if "image" in members}
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in whole], dtype=np.bytes_)
    table = [[members.get(kind, _ABSENT) for kind in kinds] for members in whole.values()]
    places = np.array(table, dtype=np.int64).reshape(-1, len(kinds), 2)
    examples |= {cause: f"shard {shard!r}" for cause in skipped if cause not in examples}
    return Scan(keys, places, tuple(kinds), +skipped, stamp, examples)


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix: the base name is cut at its first dot."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def _stamp(shard: str) -> tuple[int, int, int]:
    status = os.stat(shard)
    return _VERSION, status.st_size, status.st_mtime_ns


def _parse(meta: bytes | None) -> dict[str, Any]:
    try:
        parsed = json.loads(meta or b"{}")
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
