"""Parquet with the images in it, as hubs of data sets write it: read group by group, to be packed into shards."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fastclip.data.faults import BrokenSample
from fastclip.data.scan import Sample
from fastclip.data.tables import CAPTION_KEYS, IMAGE_KEYS, column

if TYPE_CHECKING:
    from fastclip.data.sources import Source


class EmbeddedReader:
    """Reads rows of a Parquet file; a shard is one of its row groups, of which the last one stays in memory."""

    def __init__(self, path: str, image: str, caption: str) -> None:
        self._path, self._columns = path, [image, caption]
        self._group = lru_cache(maxsize=1)(self._read_group)

    def read(self, shard: str, number: int) -> Sample:
        """See `sources.SampleReader`."""
        images, captions = self._group(int(shard))
        image, caption = images[number].as_py(), captions[number].as_py()
        content = image.get("bytes") if isinstance(image, dict) else image
        if not content:
            raise BrokenSample("empty_image", f"row {number} of group {shard} in {self._path!r}")
        texts = caption if isinstance(caption, list) else [caption]
        meta = {"captions": texts} if len(texts) > 1 else {}
        return Sample(f"{shard}-{number}", content, texts[0] if texts else None, meta)

    def _read_group(self, group: int) -> tuple[Any, Any]:
        from pyarrow import parquet

        table = parquet.ParquetFile(self._path).read_row_group(group, columns=self._columns)
        return table.column(self._columns[0]), table.column(self._columns[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_columns": self._columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._group = lru_cache(maxsize=1)(self._read_group)


def embedded_source(path: str, image_key: str = "", caption_key: str = "") -> "Source | None":
    """The rows of a Parquet file whose image column holds files (bytes, or {"bytes", "path"}); None where it holds
    paths. Errors: those of `tables.table_source`."""
    import pyarrow as pa
    from pyarrow import parquet

    from fastclip.data.sources import Source

    try:
        file = parquet.ParquetFile(path)
    except pa.ArrowException as error:
        raise ValueError(f"data: {path!r} is no PARQUET table: {error}") from error
    names = file.schema_arrow.names
    image = column(names, image_key, IMAGE_KEYS, "image_key", path)
    kind = file.schema_arrow.field(image).type
    if not (pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        return None
    caption = column(names, caption_key, CAPTION_KEYS, "caption_key", path)
    groups = range(file.num_row_groups)
    counts = np.array([file.metadata.row_group(group).num_rows for group in groups], np.int64)
    return Source(path, np.arange(len(counts)).astype(np.bytes_), counts, EmbeddedReader(path, image, caption))
