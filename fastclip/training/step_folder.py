"""A run's files on disk: written whole or not at all, removed so that no half is left, listed with their sha256."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from fastclip.errors import UserError
from fastclip.models.files import STEPS

MANIFEST = "manifest.json"
WRITING, DELETING = ".writing_", ".deleting_"  # before the name of a step folder
_CHUNK = 1 << 22


def clean(run: Path) -> None:
    """Removes what a killed run left half-written or half-deleted."""
    for pattern in (f"{WRITING}*", f"{DELETING}*"):
        for path in (run / STEPS).glob(pattern):
            shutil.rmtree(path)


def write_atomically(path: Path, text: str) -> None:
    """`text` as the whole content of `path`, or what was there before; on disk when this returns."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text)
    flush(aside)
    aside.rename(path)
    flush(path.parent)


def link(path: Path, target: Path) -> None:
    """Makes `path` a link to `target`, in place of the one that is there."""
    aside = path.with_name(f".{path.name}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.relative_to(path.parent))
    aside.rename(path)


def write_manifest(folder: Path, step: int, identity: dict[str, Any]) -> None:
    """The list of all files in `folder`, which are on disk when this returns."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in files}
    (folder / MANIFEST).write_text(json.dumps({"step": step, "identity": identity, "files": entries}, indent=1))
    for path in [*files, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        flush(path)


def remove(folder: Path) -> None:
    """Deletes a step folder; a kill in the midst leaves it whole, or under a name that is no step's."""
    if folder.exists():
        doomed = folder.with_name(f"{DELETING}{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path.parent} is damaged: {path.name} cannot be read ({error})") from error


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
