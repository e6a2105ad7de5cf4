"""`fastclip search --index`: pictures or captions out of an index."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastclip.cli.indexes import open_index
from fastclip.cli.search import Search, keep, warn_if_cut
from fastclip.cli.text import printable, table

if TYPE_CHECKING:
    from PIL.Image import Image


def search_index(options: Search, sentence: str, image: Image | None) -> None:
    """Prints the ranked list, and how long the query's encoding and the look-up took."""
    index, encoder = open_index(options.index, options.checkpoint, options.tokenizer, options.precision)
    if image is None:
        warn_if_cut(encoder, sentence)
    start = time.perf_counter()
    query = encoder.texts([sentence])[0] if image is None else encoder.image(image)
    encoded = time.perf_counter()
    captions = image is not None and not options.similar
    found = (
        index.find_captions(query, options.top) if captions else index.find_images(query, options.top, options.where)
    )
    done = time.perf_counter()
    rows = [(n, f"{one.score:.3f}", printable(one.key), printable(one.caption)) for n, one in enumerate(found, 1)]
    print(table([("rank", "score", "key", "caption" if captions else "its first caption"), *rows], left=(2, 3)))
    print(
        f"\n{len(index):,} images; the query encoded in {1e3 * (encoded - start):.1f} ms, "
        f"looked up in {1e3 * (done - encoded):.1f} ms"
    )
    asked = sentence or f"Like {options.image}"
    keep(options, asked, [(one.score, one.key, one.caption, index.image_file(one.number)) for one in found])
