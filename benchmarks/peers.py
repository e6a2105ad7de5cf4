"""The packages that ours is measured beside: whether they are here, and how a loss of theirs is called."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

DISTRIBUTIONS = {
    "open_clip": "open_clip_torch",
    "inf_cl": "inf_cl",
    "memeff": "memeff",
    "siglip_kernel": "siglip-kernel",
    "webdataset": "webdataset",
}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def version_of(package: str) -> str:
    """Distribution and version, for instance "open_clip_torch 3.3.0"."""
    distribution = DISTRIBUTIONS[package]
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution


def why_not(package: str, device: str) -> str | None:
    """The reason a peer's GPU kernel cannot run, or None."""
    if not installed(package):
        return f"{package} is not installed (pip install {DISTRIBUTIONS[package]})"
    if device != "cuda":
        return f"{package} runs on CUDA devices only"
    try:
        importlib.import_module(package)
    except Exception as error:  # a peer built for other versions may fail in any way; the others go on
        return f"{package} cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return None


@cache
def open_clip_losses() -> ModuleType:
    """open_clip's loss.py alone: it needs torch only, the package around it torchvision and timm."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ImportError("open_clip is not installed")
    loss_spec = importlib.util.spec_from_file_location("open_clip_losses", Path(spec.origin).parent / "loss.py")
    assert loss_spec is not None
    assert loss_spec.loader is not None
    module = importlib.util.module_from_spec(loss_spec)
    loss_spec.loader.exec_module(module)
    return module
