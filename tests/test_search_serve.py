"""The search page: what a person sees in a real browser, and what a hostile client gets."""

from __future__ import annotations

import base64
import http.client
import io
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from browser import LOW_CONTRAST, Browser, start_browser
from data_helpers import image_file, small_tokenizer, write_samples
from PIL import Image

from fastclip.cli.loading import Source, load_encoder
from fastclip.cli.serve import page
from fastclip.evaluation.index import Index, build_index
from fastclip.evaluation.server import MAX_UPLOAD, SearchServer
from fastclip.models import create_model, save_model

pytest.importorskip("faiss")

SCRIPT = b"<script>alert(1)</script>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchServer]:
    folder = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    model = create_model("debug")
    (folder / "run").mkdir()
    small_tokenizer(folder / "run", model.config.text.context_length)
    save_model(folder / "run", model, model.config)
    hostile = {
        "s1": {"json": b'{"captions": ["<script>alert(1)</script> a circle"], "label": 7}'},
        "s2": {"png": SCRIPT},
    }
    hostile["s3"] = {"png": image_file(3, (400, 90))}
    write_samples(folder / "data", 12, **hostile)
    encoder = load_encoder(Source(folder / "run", folder), "", "fp32", 8)
    build_index(encoder, [str(folder / "data")], folder / "index", model="m")
    index = Index(folder / "index")
    server = SearchServer(("127.0.0.1", 0), index, encoder, lambda answer: page(answer, "12 images"))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(
    server: SearchServer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    found = reply.status, dict(reply.getheaders()), reply.read()
    connection.close()
    return found


def form(file: bytes, name: str = "x.png", boundary: str = "b0undary") -> tuple[bytes, str]:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
    body = f"{head}Content-Type: image/png\r\n\r\n".encode() + file + f"\r\n--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"


def test_a_sentence_and_a_filter(server: SearchServer) -> None:
    status, headers, body = ask(server, "GET", "/?q=a+red+circle")
    assert status == 200
    assert body.count(b'<img src="/image/') == 11  # one of twelve cannot be read
    assert b"<script" not in body
    assert b"&lt;script&gt;alert(1)" in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert ask(server, "GET", "/?q=red&where=label%3D7")[2].count(b'<img src="/image/') == 1
    assert b"a filter must be field=value" in ask(server, "GET", "/?q=red&where=label")[2]
    assert b"Nothing fits." in ask(server, "GET", "/?q=red&where=label%3D99")[2]
    assert b'<img src="/image/' not in ask(server, "GET", "/")[2]


def test_images_are_thumbnails_by_number(server: SearchServer) -> None:
    status, headers, body = ask(server, "GET", "/?q=red")
    numbers = [int(n) for n in re.findall(rb'src="/image/(\d+)"', body)]
    sizes = []
    for number in numbers:
        status, headers, body = ask(server, "GET", f"/image/{number}")
        assert (status, headers["Content-Type"]) == (200, "image/png")
        sizes.append(Image.open(io.BytesIO(body)).size)
    assert (360, 81) in sizes
    broken = next(n for n in range(12) if n not in numbers)
    assert ask(server, "GET", f"/image/{broken}")[0] == 404  # its bytes are a script and are not sent


def test_pictures_like_one_of_the_index_or_an_upload(server: SearchServer) -> None:
    body, kind = form(image_file(9))
    status, _, found = ask(server, "POST", "/", body, Content_Type=kind)
    assert status == 200
    first = re.search(rb'src="/image/(\d+)".*?<bdi>(\d+)</bdi>', found, re.DOTALL)
    assert first is not None
    assert first[2] == b"0009"
    like = ask(server, "GET", f"/?like={int(first[1])}")[2]
    again = re.search(rb"<bdi>(\d{4})</bdi>", like)
    assert again is not None
    assert again[1] == b"0009"


@pytest.mark.parametrize(
    "path",
    [
        "/image/../../../etc/passwd",
        "/image/..%2f..%2fetc%2fpasswd",
        "/image/-1",
        "/image/12",
        "/image/99999999999999999999999",
        "/image/1/",
        "/image/%00",
        "/../index.json",
        "//etc/passwd",
        "/index.json",
        "/items.sqlite",
        "http://example.com/etc/passwd",
    ],
)
def test_other_paths_lead_nowhere(server: SearchServer, path: str) -> None:
    status, _, body = ask(server, "GET", path)
    assert status == (421 if path.startswith("http") else 404)
    assert b"root:" not in body
    assert b"Traceback" not in body


@pytest.mark.parametrize(
    "query", ["q=" + "x" * 1001, "q=" + quote("\u0643\u0644\u0628 \x00 \ud7ff"), "like=-1", "like=1e9", "like=%C2%B2"]
)
def test_odd_queries_get_a_page(server: SearchServer, query: str) -> None:
    status, _, body = ask(server, "GET", f"/?{query}")
    assert status == 200
    assert b"Traceback" not in body


def test_a_query_over_the_context_length_is_said_to_be_cut(server: SearchServer) -> None:
    body = ask(server, "GET", "/?q=" + "+".join(["circle"] * 130))[2]
    assert re.search(rb"The sentence has \d{3,} tokens, the model read the first \d+", body)
    assert body.count(b'<img src="/image/') == 11


def test_a_fault_is_not_shown(
    server: SearchServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "encode", None)
    status, _, body = ask(server, "GET", "/?q=red")
    assert (status, body) == (500, b"a fault in the server")
    assert "TypeError" in capsys.readouterr().err


def test_too_many_fields(server: SearchServer) -> None:
    assert ask(server, "GET", "/?" + "&".join(f"a{n}=1" for n in range(50)))[0] == 400


def test_uploads_are_capped_and_verified(server: SearchServer) -> None:
    body, kind = form(image_file(0))
    big = str(MAX_UPLOAD + 1)
    raw = socket.create_connection(server.server_address[:2], timeout=20)  # nothing of the body is ever sent
    host = f"127.0.0.1:{server.server_address[1]}"
    raw.sendall(f"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {big}\r\n\r\n".encode())
    assert b"413" in raw.recv(200).split(b"\r\n")[0]
    raw.close()
    assert ask(server, "POST", "/", body, Content_Type="text/plain")[0] == 415
    assert ask(server, "POST", "/image/1", body, Content_Type=kind)[0] == 404
    assert ask(server, "POST", "/", iter([body]), Content_Type=kind, Transfer_Encoding="chunked")[0] == 411
    for length in ("-5", "1e3", "abc"):
        assert ask(server, "POST", "/", body, Content_Type=kind, Content_Length=length)[0] == 411
    for file in (b"", b"GIF89a" + bytes(50), image_file(0)[:40], SCRIPT, b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        sent, kind = form(file, name='../../x"<b>.png')
        status, _, said = ask(server, "POST", "/", sent, Content_Type=kind)
        assert status == 200
        assert b"no PNG, JPEG, WebP or BMP file" in said
        assert b'<img src="/image/' not in said
    for sent, kind in ((b"junk", "multipart/form-data"), (b"", "multipart/form-data; boundary=x")):
        assert b"no PNG, JPEG" in ask(server, "POST", "/", sent, Content_Type=kind)[2]


def test_a_picture_that_promises_too_many_pixels(server: SearchServer) -> None:
    header = bytearray(image_file(0))
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # a decompression bomb's header
    body, kind = form(bytes(header))
    assert b"no PNG, JPEG" in ask(server, "POST", "/", body, Content_Type=kind)[2]


def test_other_hosts_origins_and_methods(server: SearchServer) -> None:
    assert ask(server, "GET", "/", Host="evil.example")[0] == 421  # a name that was made to point here
    assert ask(server, "GET", "/", Host="localhost")[0] == 200
    body, kind = form(image_file(0))
    assert ask(server, "POST", "/", body, Content_Type=kind, Origin="http://evil.example")[0] == 403
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        assert ask(server, method, "/")[0] == 501
    status, headers, body = ask(server, "HEAD", "/")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 1000


def test_a_client_that_says_nothing_blocks_nobody(server: SearchServer) -> None:
    silent = [socket.create_connection(server.server_address[:2]) for _ in range(20)]
    assert ask(server, "GET", "/?q=red")[0] == 200
    for connection in silent:
        connection.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = start_browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_a_browser_searches(browser: Browser, server: SearchServer, tmp_path: Path, width: int, scheme: str) -> None:
    home = f"http://127.0.0.1:{server.server_address[1]}/"
    browser.open(home, width, scheme=scheme)
    browser.events.clear()
    browser.evaluate("document.querySelector('[name=q]').value = 'a green square'")
    browser.evaluate("document.querySelector('form[role=search]').requestSubmit()")
    browser.wait_for_load()
    assert browser.evaluate("document.querySelector('h1').textContent") == "a green square"
    broken = (
        "[...document.images].filter(image => (image.scrollIntoView(), image.loading = 'eager', !image.alt)).length"
    )
    assert browser.evaluate(broken) == 0
    assert browser.evaluate("document.querySelectorAll('.results li').length") == 11
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(LOW_CONTRAST) == []
    assert browser.evaluate("document.scripts.length") == 0

    (tmp_path / "upload.png").write_bytes(image_file(5))
    document = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=document, selector="#image")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / "upload.png")])
    browser.events.clear()
    browser.evaluate("document.querySelector('#upload').click()")
    browser.wait_for_load()
    assert browser.evaluate("document.querySelector('.results bdi').textContent") == "0005"
    assert browser.evaluate("document.querySelector('.asked-image').naturalWidth") == 8
    assert browser.evaluate(LOW_CONTRAST) == []
    shot = browser.call("Page.captureScreenshot")["data"]
    assert Image.open(io.BytesIO(base64.b64decode(shot))).width == width
    assert "Page.javascriptDialogOpening" not in [event["method"] for event in browser.events]
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith((home, "data:")) for url in asked)
