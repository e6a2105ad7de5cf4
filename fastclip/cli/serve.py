"""`fastclip serve`: a page with a search box for an index, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastclip.cli.indexes import open_index
from fastclip.cli.options import Checkpoint, Precision, TokenizerPath, optional, parse
from fastclip.errors import UserError

if TYPE_CHECKING:
    from fastclip.evaluation.server import Answer


@dataclass(frozen=True)
class Serve:
    """A page with a search box and the pictures of an index, until Ctrl-C.

    Only this machine can reach it unless --host says otherwise.

    Example: fastclip serve --index runs/demo/index
    """

    index: Annotated[str, optional("DIR", "needed")] = ""
    """An index that fastclip index made."""
    host: str = "127.0.0.1"
    """Address to listen on. Anyone who reaches another than 127.0.0.1 sees the images."""
    port: int = 8765
    """Port to listen on, 0 for a free one."""
    checkpoint: Checkpoint = ""
    """The weights that the index was made with, if they have moved."""
    precision: Precision = "fp32"
    """Of the model's computation."""
    tokenizer: TokenizerPath = ""
    """A tokenizers JSON, its folder, or a model name."""


def main(arguments: Sequence[str]) -> None:
    """See `Serve`."""
    options = parse(Serve, "serve", arguments)
    if not 0 <= options.port < 65536:
        raise UserError(f"--port must be 0 to 65535, was {options.port}")
    index, encoder = open_index(options.index, options.checkpoint, options.tokenizer, options.precision)
    from fastclip.evaluation.server import SearchServer

    def render(answer: Answer) -> str:
        return page(answer, f"{len(index):,} images of {Path(options.index).name}")

    try:
        server = SearchServer((options.host, options.port), index, encoder, render)
    except OSError as error:
        raise UserError(f"--host {options.host} --port {options.port}: {error.strerror}") from None
    host, port = server.server_address[:2]
    print(f"{len(index):,} images: http://{host!s}:{port}  (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()


def page(answer: Answer, title: str) -> str:
    """The HTML of an answer."""
    from fastclip.report.search_page import Result, SearchPage, render_search

    results = [Result(f"/image/{one.number}", one.score, one.key, one.caption, one.number) for one in answer.found]
    return render_search(
        SearchPage(
            title=title,
            results=results,
            asked=answer.asked,
            asked_image=answer.image,
            error=answer.error,
            with_form=True,
            fields=answer.fields,
        )
    )
