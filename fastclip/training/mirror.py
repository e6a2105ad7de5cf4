"""A run's newest checkpoints in a second place: any URL that fsspec writes (s3://, gs://, hdfs://, sftp://, file://).

<mirror>/checkpoints/step_00000500/   as in the run folder; its manifest.json is written last
         metrics.jsonl, config.yaml ..., eval/    the run's own files, as they stood at that step
         latest                       the name of the newest step folder that is whole

Copying goes on beside training. What cannot be copied is said and tried again with the next checkpoint: a mirror that
is away ends no run.
"""

from __future__ import annotations

import json
import posixpath
import shutil
import threading
from pathlib import Path, PurePosixPath
from typing import Any

from fastclip.errors import UserError, in_a_line
from fastclip.models.files import LATEST, STEPS
from fastclip.training.step_folder import MANIFEST, WRITING, write_atomically

LONGEST_WAIT = 600.0  # seconds at the end of a run
_GO_ON = ("metrics.jsonl", "quarantine.jsonl")  # what a run adds lines to


class Mirror:
    """The first rank's. `run` is the run folder, `keep` the number of step folders to keep in the mirror."""

    def __init__(self, url: str, run: Path, keep: int) -> None:
        """Raises UserError for a URL that no file system here takes."""
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise UserError("--mirror needs the package fsspec: pip install 'fastclip-kernels[data]'") from None
        try:
            self._files, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"--mirror {url}: {error}") from error
        self.url, self.run, self.keep = url, run, keep
        self._lock = threading.Lock()
        self._wanted: Path | None = None
        self._copying: threading.Thread | None = None
        self._copied = ""

    def push(self, folder: Path) -> None:
        """Copies a whole step folder in the background; of several that wait only the newest."""
        with self._lock:
            self._wanted = folder
            if self._copying is None:
                self._copying = threading.Thread(target=self._copy, daemon=True)
                self._copying.start()

    def finish(self, newest: Path, timeout: float = LONGEST_WAIT) -> None:
        """Copies once more what a run leaves, and returns when `newest` is in the mirror, or says that it is not."""
        self.push(newest)  # behind what is under way: with the last lines, the report, and what failed before
        copying = self._copying
        if copying:
            copying.join(timeout)
        if self._copied != newest.name:
            print(f"\n{newest.name} is not in the mirror {self.url}: it is in {newest} alone", flush=True)

    def pull(self) -> None:
        """Brings the mirror's newest step folder and its metrics to the run folder, where that has none as new.

        Raises UserError if the mirror cannot be read.
        """
        try:
            name = self._newest()
            steps = self.run / STEPS
            if not name or any(path.name >= name for path in steps.glob("step_*")):
                return
            aside = steps / f"{WRITING}{name}"
            shutil.rmtree(aside, ignore_errors=True)
            manifest = self._files.cat_file(self._at(STEPS, name, MANIFEST))
            for file in [MANIFEST, *json.loads(manifest)["files"]]:
                if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                    raise ValueError(f"{MANIFEST} names {file!r}, which lies elsewhere")
                (aside / file).parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(self._at(STEPS, name, file), str(aside / file))
            for file in _GO_ON:
                if self._files.exists(self._at(file)):
                    self._files.get_file(self._at(file), str(self.run / file))
            aside.rename(steps / name)
            self._copied = name
            write_atomically(self.run / LATEST, f"{name}\n")
        except Exception as error:  # what a file system may raise is its own affair
            raise UserError(f"--mirror {self.url} cannot be read: {in_a_line(error)}") from error

    def _copy(self) -> None:
        while True:
            with self._lock:
                folder, self._wanted = self._wanted, None
                if folder is None:
                    self._copying = None
                    return
            try:
                self._put(folder)
            except Exception as error:  # as above
                if folder.exists():  # else newer ones are there already, and one of them waits
                    print(f"\nthe mirror {self.url} cannot be written: {in_a_line(error)}; the run goes on", flush=True)

    def _put(self, folder: Path) -> None:
        own = sorted(path for pattern in ("*", "eval/*") for path in self.run.glob(pattern) if path.is_file())
        for path in own:
            if path.name != LATEST and not path.name.startswith("."):
                self._put_file(path)
        if folder.name == self._copied:
            return
        inside = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == MANIFEST)
        for path in inside:
            self._put_file(path)
        self._files.pipe_file(self._at(LATEST), f"{folder.name}\n".encode())
        self._copied = folder.name
        for old in [name for name in self._steps() if name <= folder.name][: -self.keep]:
            self._files.rm_file(self._at(STEPS, old, MANIFEST))  # from here on it is no checkpoint
            self._files.rm(self._at(STEPS, old), recursive=True)

    def _put_file(self, path: Path) -> None:
        there = self._at(*path.relative_to(self.run).parts)
        self._files.makedirs(posixpath.dirname(there), exist_ok=True)
        self._files.put_file(str(path), there)

    def _newest(self) -> str:
        """The step folder to go on from, "" where there is none."""
        if not self._files.exists(self._at(STEPS)):
            return ""
        whole = [name for name in self._steps() if self._is_whole(name)]
        named = self._read(LATEST).strip()
        return named if named in whole else max(whole, default="")

    def _steps(self) -> list[str]:
        names = (posixpath.basename(path.rstrip("/")) for path in self._files.ls(self._at(STEPS), detail=False))
        return sorted(name for name in names if name.startswith("step_"))

    def _is_whole(self, name: str) -> bool:
        try:
            return isinstance(json.loads(self._read(STEPS, name, MANIFEST)), dict)
        except ValueError:
            return False

    def _read(self, *parts: str) -> str:
        """The content of a small file, "" where there is none."""
        path = self._at(*parts)
        content: Any = self._files.cat_file(path) if self._files.exists(path) else b""
        return content.decode()

    def _at(self, *parts: str) -> str:
        return posixpath.join(self._root, *parts)
