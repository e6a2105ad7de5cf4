"""Shards that lie elsewhere: `pipe:command`, or any URL that fsspec opens, fetched whole into a bounded local cache.

A fetch that brings nothing for `timeout` seconds is given up, tried again after 1, 2, 4 ... seconds, and then an
`OSError`. The processes of a machine share the cache, and fetch a shard once.
"""

import contextlib
import fcntl
import hashlib
import os
import queue
import re
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_CHUNK = 1 << 20
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_FORGIVE_AFTER = 600.0  # seconds until a URL that failed is tried again


def is_remote(name: str) -> bool:
    """Whether `name` is a URL or a `pipe:` command, not a path."""
    return name.startswith("pipe:") or _URL.match(name) is not None


class Fetcher:
    """Local copies of remote shards.

    Args:
        folder: of the cache; one of this user's own in the temporary directory by default.
        max_bytes: the oldest copies give way above this.
        timeout: seconds without a byte.
        retries: further tries after the first.
    """

    def __init__(
        self, folder: str = "", max_bytes: int = 50_000_000_000, timeout: float = 60.0, retries: int = 3
    ) -> None:
        self._folder = Path(folder or os.path.join(tempfile.gettempdir(), f"fastclip-shards-{os.getuid()}"))
        self._max_bytes, self._timeout, self._retries = max_bytes, timeout, retries
        self._failed: dict[str, tuple[float, str]] = {}

    def local(self, url: str) -> str:
        """The path of a local copy of `url`. Errors: `OSError`."""
        since, reason = self._failed.get(url, (-_FORGIVE_AFTER, ""))
        if time.monotonic() - since < _FORGIVE_AFTER:
            raise OSError(reason)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._folder.stat().st_uid != os.getuid():
            raise PermissionError(f"shard cache: {self._folder} belongs to another user; give another folder")
        path = self._folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                try:
                    self._fetch(url, path)
                except OSError as error:
                    self._failed[url] = time.monotonic(), str(error)
                    raise
                self._make_room(path)
            os.utime(path.with_suffix(".lock"))
        return os.fspath(path)

    def _fetch(self, url: str, path: Path) -> None:
        temporary = path.with_suffix(f".{os.getpid()}.part")
        try:
            for attempt in range(self._retries + 1):
                try:
                    with open(temporary, "wb") as file:
                        for chunk in self._chunks(url):
                            file.write(chunk)
                    os.replace(temporary, path)
                    return
                except OSError as error:
                    last = error
                    if attempt < self._retries:
                        time.sleep(2.0**attempt)
            raise OSError(f"{url}: {last} (tried {self._retries + 1} times)")
        finally:
            temporary.unlink(missing_ok=True)

    def _chunks(self, url: str) -> Iterator[bytes]:
        return _from_pipe(url[5:], self._timeout) if url.startswith("pipe:") else _from_url(url, self._timeout)

    def _make_room(self, newest: Path) -> None:
        """Removes the copies unused for longest; one that is open stays readable until it is closed."""
        copies = []
        for path in self._folder.glob("*.tar"):
            with contextlib.suppress(OSError):
                copies.append((path.with_suffix(".lock").stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self._max_bytes or path == newest:
                break
            for file in (path, Path(f"{path}.index.npz")):
                file.unlink(missing_ok=True)
            total -= size


def _from_pipe(command: str, timeout: float) -> Iterator[bytes]:
    """What a shell command writes."""
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        while True:
            if not select.select([process.stdout], [], [], timeout)[0]:
                raise TimeoutError(f"nothing came for {timeout:g} s")
            chunk = os.read(process.stdout.fileno(), _CHUNK)
            if not chunk:
                break
            yield chunk
        if status := process.wait(timeout):
            raise OSError(f"the command ended with status {status}")
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"the command did not end within {timeout:g} s") from error
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def _from_url(url: str, timeout: float) -> Iterator[bytes]:
    """The content of what fsspec opens, read by a thread that a stall leaves behind."""
    chunks: queue.Queue[bytes | Exception] = queue.Queue(maxsize=4)
    is_over = threading.Event()

    def read() -> None:
        import fsspec

        try:
            with fsspec.open(url, "rb") as file:
                while not is_over.is_set() and (chunk := file.read(_CHUNK)):
                    chunks.put(chunk)
            chunks.put(b"")
        except Exception as error:  # what a file system may raise is its own affair
            chunks.put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            chunk = chunks.get(timeout=timeout)
            if isinstance(chunk, Exception):
                raise OSError(f"{type(chunk).__name__}: {chunk}") from chunk
            if not chunk:
                return
            yield chunk
    except queue.Empty as error:
        raise TimeoutError(f"nothing came for {timeout:g} s") from error
    finally:
        is_over.set()
