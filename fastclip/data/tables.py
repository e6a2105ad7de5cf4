"""Tables of image paths and captions: CSV, TSV, Parquet.

A table is converted once to an Arrow file beside it (`x.csv.index.arrow`), in pieces, and read from there through the
page cache: any row in a microsecond, memory that does not grow with the table, shared by all processes.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fastclip.data.faults import BrokenSample
from fastclip.data.files import read_image_file
from fastclip.data.scan import Sample

if TYPE_CHECKING:
    from fastclip.data.sources import Source

SUFFIXES = (".csv", ".tsv", ".parquet")
IMAGE_KEYS = ("filepath", "image_path", "path", "file_name", "filename", "image")
CAPTION_KEYS = ("title", "caption", "captions", "text")
_VERSION = "1"
_ROWS = 1 << 14  # of a batch, which counts as a shard


class TableReader:
    """Reads rows of a converted table; a shard is one of its batches."""

    def __init__(self, path: str, folder: str) -> None:
        self._path, self._folder = path, folder
        self._file: Any = None

    def read(self, shard: str, number: int) -> Sample:
        """See `sources.SampleReader`."""
        image, captions = self.row(int(shard), number)
        if image is None:
            raise BrokenSample("missing_file", f"row {number} of batch {shard} in {self._path!r} names no image")
        try:
            path = image.decode("utf-8")
            texts = [caption.decode("utf-8") for caption in captions if caption is not None]
        except UnicodeDecodeError as error:
            raise BrokenSample("invalid_utf8", f"{error} in {self._path!r}") from error
        meta = {"captions": texts} if len(texts) > 1 else {}
        return Sample(path, read_image_file(os.path.join(self._folder, path)), texts[0] if texts else None, meta)

    def row(self, batch: int, number: int) -> tuple[bytes | None, list[bytes | None]]:
        """Path and captions of a row as they stand in the table."""
        table = self._table().get_batch(batch)
        return table.column(0)[number].as_py(), table.column(1)[number].as_py() or []

    def counts(self) -> np.ndarray:
        """Rows of each batch: int64 (batches,)."""
        file = self._table()
        return np.array([file.get_batch(batch).num_rows for batch in range(file.num_record_batches)], np.int64)

    def _table(self) -> Any:
        if self._file is None:
            import pyarrow as pa

            self._file = pa.ipc.open_file(pa.memory_map(self._path))
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


def table_source(path: str, image_key: str = "", caption_key: str = "") -> "Source":
    """The rows of a table as samples. An image is named relative to the table's folder, or, where the first one does
    not lie there, to the working directory; the caption column holds a text or a list of texts.

    `image_key`, `caption_key`: the columns; by default the first there is of IMAGE_KEYS and CAPTION_KEYS.
    Errors: `FileNotFoundError`; `ValueError` for a table without rows or without these columns, or that is none.
    """
    from fastclip.data.sources import Source

    if not os.path.isfile(path):
        raise FileNotFoundError(f"data: {path!r} does not exist")
    converted, skipped = _converted(path, image_key, caption_key)
    folder = os.path.dirname(os.path.abspath(path))
    reader = TableReader(converted, folder)
    counts = reader.counts()
    if not counts.sum():
        raise ValueError(f"data: {path!r} holds no rows")
    first = reader.row(int(np.flatnonzero(counts)[0]), 0)[0] or b""
    if not os.path.exists(os.path.join(folder.encode(), first)) and os.path.exists(first):
        reader = TableReader(converted, os.getcwd())
    examples = {"malformed_row": f"a row of {path!r} has not as many fields as the first"} if skipped else {}
    return Source(path, np.arange(len(counts)).astype(np.bytes_), counts, reader, skipped, examples)


def _converted(path: str, image_key: str, caption_key: str) -> tuple[str, Counter[str]]:
    """The Arrow file of a table, made where there is none that fits, and its malformed rows."""
    import pyarrow as pa

    status = os.stat(path)
    stamp = f"{_VERSION} {status.st_size} {status.st_mtime_ns} {image_key} {caption_key}".encode()
    target = f"{path}.index.arrow"
    try:
        with pa.memory_map(target) as file:
            kept = pa.ipc.open_file(file)
            _, notes = kept.get_batch_with_custom_metadata(kept.num_record_batches - 1)
            if kept.schema.metadata[b"stamp"] == stamp:
                return target, +Counter(malformed_row=int(notes[b"malformed"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or it is another one
    skipped: Counter[str] = Counter()
    fields = [("image", pa.binary()), ("captions", pa.list_(pa.binary()))]
    schema = pa.schema(fields, metadata={"stamp": stamp})
    try:
        handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=os.path.dirname(os.path.abspath(path)))
    except OSError:  # a read-only folder
        handle, temporary = tempfile.mkstemp(suffix=".arrow")
        target = temporary
    try:
        with os.fdopen(handle, "wb") as out, pa.ipc.new_file(out, schema) as writer:
            for batch in _stream(path, image_key, caption_key, skipped, pa):
                for first in range(0, batch.num_rows, _ROWS):
                    writer.write_batch(pa.record_batch(batch.slice(first, _ROWS).columns, schema=schema))
            end = pa.record_batch([pa.array([], kind) for _, kind in fields], schema=schema)
            writer.write_batch(end, custom_metadata={"malformed": str(skipped["malformed_row"])})
    except (pa.ArrowException, UnicodeDecodeError) as error:
        os.unlink(temporary)
        raise ValueError(f"data: {path!r} is no {path.rpartition('.')[2].upper()} table: {error}") from error
    except BaseException:
        os.unlink(temporary)
        raise
    if target != temporary:
        os.replace(temporary, target)
    return target, +skipped


def _stream(path: str, image_key: str, caption_key: str, skipped: Counter[str], pa: Any) -> Iterator[Any]:
    """Batches of (path, list of captions)."""
    image, caption = "", ""
    for batch in (_parquet if path.endswith(".parquet") else _csv)(path, image_key, caption_key, skipped):
        if not image:
            image = column(batch.schema.names, image_key, IMAGE_KEYS, "image_key", path)
            caption = column(batch.schema.names, caption_key, CAPTION_KEYS, "caption_key", path)
        paths, texts = batch.column(image), batch.column(caption)
        if not (
            pa.types.is_string(paths.type) or pa.types.is_large_string(paths.type) or pa.types.is_binary(paths.type)
        ):
            raise ValueError(
                f"data: column {image!r} of {path!r} holds {paths.type}, not paths; a table with images in it is first "
                f"written as shards: fastclip data pack"
            )
        if pa.types.is_list(texts.type) or pa.types.is_large_list(texts.type):
            texts = texts.cast(pa.list_(pa.string())).cast(pa.list_(pa.binary()))
        else:
            offsets = pa.array(np.arange(len(texts) + 1, dtype=np.int32))
            texts = pa.ListArray.from_arrays(offsets, texts.cast(pa.binary()))
        yield pa.record_batch([paths.cast(pa.binary()), texts], names=["image", "captions"])


def _csv(path: str, image_key: str, caption_key: str, skipped: Counter[str]) -> Iterator[Any]:
    from pyarrow import binary, csv

    def skip(row: Any) -> str:
        skipped["malformed_row"] += 1
        return "skip"

    separator = "\t" if path.endswith(".tsv") else ","
    with open(path, "rb") as file:
        header = file.readline().decode("utf-8", "replace")
    names = next(iter(_header(header, separator)), [])
    types = {name: binary() for name in names}
    with csv.open_csv(
        path,
        parse_options=csv.ParseOptions(delimiter=separator, newlines_in_values=True, invalid_row_handler=skip),
        convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""]),
    ) as reader:
        yield from reader


def _header(line: str, separator: str) -> Iterator[list[str]]:
    import csv

    return iter(csv.reader([line], delimiter=separator))


def _parquet(path: str, image_key: str, caption_key: str, skipped: Counter[str]) -> Iterator[Any]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    columns = [
        column(names, image_key, IMAGE_KEYS, "image_key", path),
        column(names, caption_key, CAPTION_KEYS, "caption_key", path),
    ]
    yield from file.iter_batches(batch_size=_ROWS, columns=columns)


def column(names: list[str], wanted: str, usual: tuple[str, ...], option: str, path: str) -> str:
    """The column to read."""
    choices = (wanted,) if wanted else usual
    found = next((name for name in choices if name in names), None)
    if found is None:
        raise ValueError(
            f"data: {path!r} has the columns {', '.join(names)}; none is {' or '.join(choices)}: name it by --{option}"
        )
    return found
