"""The page of a search: a box to ask in, and the pictures or captions that were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastclip.errors import UserError

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Result:
    """A picture that was found: its address (a path of the server, or a data URI), and what is known of it."""

    image: str
    score: float
    key: str
    caption: str
    number: int = 0


@dataclass(frozen=True)
class SearchPage:
    """What the page shows. `asked` is the sentence, or the words for a picture that was asked with."""

    title: str
    results: Sequence[Result] = ()
    asked: str = ""
    about: str = ""
    asked_image: str = ""
    error: str = ""
    with_form: bool = False
    fields: dict[str, str] = field(default_factory=dict)


def render_search(page: SearchPage) -> str:
    """The page's HTML. Errors: `UserError` where jinja2 is missing."""
    try:
        import jinja2
    except ImportError as error:
        raise UserError("a page of results needs jinja2: pip install 'fastclip-kernels[eval]'") from error
    loader = jinja2.FileSystemLoader(_HERE / "templates")
    templates = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = (_HERE / "style.css").read_text("utf-8") + (_HERE / "search.css").read_text("utf-8")
    return templates.get_template("search.html").render(page=page, style=style)
