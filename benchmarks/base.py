"""`--base REV`: another commit of the package, measured by the same case files in the same rounds.

Two versions of one operator cannot be registered in one process, so the other commit runs in its own and takes its
turns over a pipe, while this one waits.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.memory import ROOT
from fastclip.errors import UserError

KERNELS = ("csrc", "fastclip/ops/_extension.py")


class Base(NamedTuple):
    """A commit laid out in a folder of its own."""

    commit: str
    folder: Path

    @property
    def prelude(self) -> str:
        """Python that imports that `fastclip`, and everything else from here."""
        return (
            f"import sys; sys.path.insert(0, {str(self.folder)!r}); import fastclip.ops; "
            f"assert fastclip.__file__.startswith({str(self.folder)!r}); sys.path.insert(0, {str(ROOT)!r})"
        )


def prepare(revision: str, root: Path = ROOT) -> Base:
    """The commit's files under build/base/, its kernels built (or copied, where their sources are the same).

    Raises:
        UserError: there is no such revision.
    """
    done = _git(root, "rev-parse", "--verify", "--short=10", f"{revision}^{{commit}}")
    if done.returncode != 0:
        raise UserError(f"--base is {revision!r}, must be a revision of this repository")
    commit = done.stdout.decode().strip()
    folder = root / "build" / "base" / commit
    if not folder.exists():
        archive = subprocess.run(["git", "-C", str(root), "archive", commit], capture_output=True, check=True).stdout
        unpacked = folder.with_suffix(".part")
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir(parents=True)
        subprocess.run(["tar", "-x", "-C", str(unpacked)], input=archive, check=True)
        _kernels(root, commit, unpacked)
        unpacked.rename(folder)
    return Base(commit, folder)


def _kernels(root: Path, commit: str, folder: Path) -> None:
    libraries = sorted((root / "fastclip").glob("_C*.so"))
    is_same = _git(root, "diff", "--quiet", commit, "--", *KERNELS).returncode == 0
    if is_same and libraries:
        shutil.copy(libraries[0], folder / "fastclip")
        return
    print(f"building the kernels of {commit}", flush=True)
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); from fastclip.ops import _extension; _extension.build()"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"they are not built, its other implementations run: {done.stderr.strip().splitlines()[-1]}", flush=True)


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
