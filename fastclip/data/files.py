"""Samples that are files of a folder, and samples that are made up."""

import io
import os
import stat
from collections import Counter
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fastclip.data.faults import BrokenSample
from fastclip.data.scan import IMAGE_SUFFIXES, MAX_TEXT_BYTES, Sample, make_sample
from fastclip.data.streams import Stream
from fastclip.data.tar import MAX_MEMBER_BYTES

if TYPE_CHECKING:
    from fastclip.data.sources import Source

_STRETCH = 4096  # files of a folder that count as one shard
_SYNTHETIC_SHARD = 10_000
_SYNTHETIC_FILES = 64
_SYNTHETIC_SIZE = 256


def read_file(path: str, max_bytes: int) -> bytes:
    """The content of a plain file. Errors: `BrokenSample` for what is none, or larger; `OSError`."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe must not wait for its writer
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise BrokenSample("special_file", f"{path!r} is no plain file")
        if status.st_size > max_bytes:
            raise BrokenSample("oversized_file", f"{path!r} has {status.st_size} bytes, more than {max_bytes}")
        return os.read(file, status.st_size)
    finally:
        os.close(file)


def read_image_file(path: str) -> bytes:
    """The bytes of an image file. Errors: `BrokenSample`."""
    try:
        return read_file(path, MAX_MEMBER_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BrokenSample("missing_file", error) from error
    except (OSError, ValueError) as error:
        raise error if isinstance(error, BrokenSample) else BrokenSample("unreadable_file", error) from error


class FolderReader:
    """Reads `a.jpg` with `a.txt` and `a.json` from a folder; a shard is a stretch of the sorted list of images."""

    def __init__(self, folder: str, images: np.ndarray) -> None:
        self._folder, self._images = folder, images

    def read(self, shard: str, number: int) -> Sample:
        """See `sources.SampleReader`."""
        image = os.fsdecode(self._images[int(shard) * _STRETCH + number])
        path = os.path.join(self._folder, image)
        contents = {"image": read_image_file(path)}
        for suffix in ("txt", "json"):
            try:
                contents[suffix] = read_file(f"{os.path.splitext(path)[0]}.{suffix}", MAX_TEXT_BYTES)
            except OSError:
                continue
        return make_sample(os.path.splitext(image)[0], contents)


def folder_source(folder: str) -> "Source":
    """The images of a folder and the folders below it, in sorted order. Errors: `ValueError` where there is none.

    Links are not followed into other folders. Of two images with one stem the first is used, duplicate_key counts the
    others.
    """
    from fastclip.data.sources import Source

    found: list[str] = []
    for where, _, names in os.walk(folder):
        inside = os.path.relpath(where, folder)
        for name in names:
            if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                found.append(name if inside == "." else os.path.join(inside, name))
    if not found:
        raise ValueError(f"shards: the directory {folder!r} holds no *.tar file, and no image")
    stems: dict[str, str] = {}
    for name in sorted(found):
        stems.setdefault(os.path.splitext(name)[0], name)
    skipped = Counter({"duplicate_key": len(found) - len(stems)})
    images = np.array([os.fsencode(name) for name in stems.values()], dtype=np.bytes_)
    shards, counts = stretches(len(images), _STRETCH)
    examples = {"duplicate_key": f"two images of one name in {folder!r}"} if +skipped else {}
    return Source(folder, shards, counts, FolderReader(folder, images), +skipped, examples)


def stretches(samples: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Names "0", "1" ... and counts of the stretches of `size` samples that make up `samples`."""
    counts = np.full(-(-samples // size), size, np.int64)
    if samples % size:
        counts[-1] = samples % size
    return np.arange(len(counts)).astype(np.bytes_), counts


class SyntheticReader:
    """Made-up pairs: one of 64 JPEG files, and a caption of its number."""

    def __init__(self, size: int) -> None:
        self._size = size

    def read(self, shard: str, number: int) -> Sample:
        """See `sources.SampleReader`."""
        number += int(shard) * _SYNTHETIC_SHARD
        image = synthetic_jpeg(number % _SYNTHETIC_FILES, self._size)
        return Sample(f"synthetic-{number:09d}", image, synthetic_caption(number), {})


def synthetic_source(spec: str) -> "Source":
    """`synthetic:COUNT` or `synthetic:COUNT:SIZE`, pixels along an edge. Errors: `ValueError` for another spelling."""
    from fastclip.data.sources import Source

    count, _, size = spec.removeprefix("synthetic:").partition(":")
    if not count.isdigit() or not (size or "1").isdigit() or int(count) < 1 or int(size or 1) < 1:
        raise ValueError(f"data: {spec!r} must be synthetic:COUNT or synthetic:COUNT:SIZE, two positive numbers")
    names, counts = stretches(int(count), _SYNTHETIC_SHARD)
    return Source(spec, names, counts, SyntheticReader(int(size or _SYNTHETIC_SIZE)))


@cache
def synthetic_jpeg(number: int, size: int = _SYNTHETIC_SIZE) -> bytes:
    """A JPEG of soft patches under noise, about as hard to decode as a photograph: 24 kB at 256 pixels."""
    from PIL import Image

    draw = np.random.default_rng(number)
    soft = Image.fromarray(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)).resize((size, size), 3)
    pixels = np.asarray(soft).astype(np.int16) + draw.integers(-12, 13, (size, size, 3))
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


_TEXT = (
    "a photo of the red dog cat running on grass beach holding ball with blue sky mountain lake kitchen table "
    "vintage poster stock image illustration vector art sale new best home decor wedding dress women's"
)


@lru_cache(maxsize=4096)
def synthetic_caption(number: int) -> str:
    """A caption of 5 to 16 everyday words."""
    stream, words = Stream("synthetic caption", number), _TEXT.split()
    return " ".join(stream.choice(words) for _ in range(5 + stream.below(12)))
