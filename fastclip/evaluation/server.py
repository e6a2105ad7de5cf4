"""A small web server for one search index: a page with a search box, on the standard library's http.server.

Pictures are asked for by number and sent as thumbnails made here, so no path and no byte of a file reaches the browser
as it is. Uploads are capped before they are read and must decode; a request for another host's name is refused, which
keeps pages of other sites away from a server on this machine.
"""

from __future__ import annotations

import io
import re
import threading
import traceback
from base64 import b64encode
from collections.abc import Callable
from email.parser import BytesParser
from email.policy import HTTP
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, urlsplit

from torch import Tensor

from fastclip.data.transforms import decode_image
from fastclip.evaluation.encoder import Encoder
from fastclip.evaluation.index import Found, Index

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_UPLOAD = 10 << 20
MAX_WORDS = 1000  # characters of a query
SHOWN = 24
THUMBNAIL = 360  # pixels along the longer side
TIMEOUT = 15  # seconds that a client may be silent
_NUMBER = re.compile(r"/image/(\d{1,12})")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
}


class Answer(NamedTuple):
    """What a page shows of one question."""

    asked: str
    found: list[Found]
    image: str  # a data URI of the picture that was asked with, or ""
    error: str
    fields: dict[str, str]


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class SearchServer(ThreadingHTTPServer):
    """Answers `GET /?q=words&where=field=value`, `GET /?like=number`, `POST /` with a picture, `GET /image/<number>`.

    Args:
        address: (host, port); port 0 takes a free one, see `server_address`.
        render: an answer -> the page's HTML.
        hosts: names under which it may be asked for, beside its own address and localhost.
    """

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        index: Index,
        encoder: Encoder,
        render: Callable[[Answer], str],
        hosts: tuple[str, ...] = (),
    ) -> None:
        self.index, self.encoder, self.render = index, encoder, render
        self.names = {"localhost", "127.0.0.1", "[::1]", address[0], *hosts}
        self._model = threading.Lock()  # one forward at a time
        super().__init__(address, _Handler)

    def encode(self, query: str | Image) -> Tensor:
        """Features (D,) of a sentence or a picture."""
        with self._model:
            return self.encoder.texts([query])[0] if isinstance(query, str) else self.encoder.image(query)


class _Handler(BaseHTTPRequestHandler):
    server: SearchServer
    timeout = TIMEOUT
    server_version, sys_version = "fastclip", ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: a query may be private."""

    def _answer(self, handle: Callable[[], tuple[str, bytes]]) -> None:
        try:
            name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if name not in self.server.names:
                raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, "this server does not answer under that name")
            kind, body = handle()
            self._send(HTTPStatus.OK, kind, body)
        except _Refused as refused:
            self.close_connection = True  # what is left of the request is not read
            self._send(refused.status, "text/plain; charset=utf-8", refused.why.encode())
        except (TimeoutError, ConnectionError):
            self.close_connection = True
        except Exception:  # the client learns that there was a fault, the terminal which
            self.close_connection = True
            traceback.print_exc()
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", b"a fault in the server")

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _get(self) -> tuple[str, bytes]:
        url = urlsplit(self.path)
        if url.path == "/":
            return self._page(self._asked(url.query))
        match = _NUMBER.fullmatch(url.path)
        if match is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is / and /image/<number>")
        try:
            return "image/png", _thumbnail(decode_image(self.server.index.image_file(int(match[1]))))
        except (ValueError, OSError):
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such image") from None

    def _asked(self, query: str) -> Answer:
        try:
            fields = {name: values[0] for name, values in parse_qs(query, max_num_fields=8).items()}
        except ValueError:
            raise _Refused(HTTPStatus.BAD_REQUEST, "too many fields") from None
        words, where, like = (fields.get(name, "").strip() for name in ("q", "where", "like"))
        kept = {"q": words[:MAX_WORDS], "where": where[:MAX_WORDS]}
        if len(words) > MAX_WORDS or len(where) > MAX_WORDS:
            return Answer("", [], "", f"A query may have {MAX_WORDS} characters.", kept)
        index = self.server.index
        try:
            conditions = [where] if where else []
            if words:
                found = index.find_images(self.server.encode(words), SHOWN, conditions)
                return Answer(words, found, "", self._cut(words), kept)
            if like:
                if not (like.isdecimal() and int(like) < len(index)):
                    raise ValueError(f"there is no image {like[:20]!r}")
                found = index.find_images(index.images.rows([int(like)])[0], SHOWN, conditions)
                return Answer(f"Like image {int(like)}", found, "", "", kept)
        except ValueError as error:
            return Answer("", [], "", str(error), kept)
        return Answer("", [], "", "", kept)

    def _cut(self, words: str) -> str:
        tokens, most = (
            len(self.server.encoder.tokenizer.encode(words)),
            self.server.encoder.config.text.context_length - 2,
        )
        return f"The sentence has {tokens} tokens, the model read the first {most}." if tokens > most else ""

    def _post(self) -> tuple[str, bytes]:
        length = self.headers.get("Content-Length", "")
        if urlsplit(self.path).path != "/":
            raise _Refused(HTTPStatus.NOT_FOUND, "a picture goes to /")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            raise _Refused(HTTPStatus.FORBIDDEN, "a picture must come from this server's own page")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "Content-Length is needed")
        if int(length) > MAX_UPLOAD:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a picture may have {MAX_UPLOAD >> 20} MiB")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise _Refused(HTTPStatus.BAD_REQUEST, "the request is shorter than its Content-Length")
        file = _upload(self.headers.get("Content-Type", ""), body)
        fields = {"q": "", "where": ""}
        try:
            image = decode_image(file)
        except ValueError:
            why = "That is no PNG, JPEG, WebP or BMP file that can be decoded."
            return self._page(Answer("", [], "", why, fields))
        found = self.server.index.find_images(self.server.encode(image), SHOWN)
        uri = f"data:image/png;base64,{b64encode(_thumbnail(image)).decode()}"
        return self._page(Answer("Pictures like yours", found, uri, "", fields))

    def _page(self, answer: Answer) -> tuple[str, bytes]:
        return "text/html; charset=utf-8", self.server.render(answer).encode("utf-8", "replace")


def _upload(kind: str, body: bytes) -> bytes:
    """The first file of a multipart/form-data body; "" where there is none."""
    if not kind.lower().startswith("multipart/form-data"):
        raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a picture is sent as multipart/form-data")
    head = f"Content-Type: {kind}\r\n\r\n".encode("latin-1", "replace")
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    for part in message.iter_parts() if message.is_multipart() else ():
        if part.get_filename() is not None:
            content = part.get_payload(decode=True)
            return content if isinstance(content, bytes) else b""
    return b""


def _thumbnail(image: Image) -> bytes:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
