"""The other packages that tests compare with; `make test-all` installs them."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest


def transformers_module(name: str = "transformers") -> Any:
    """transformers or a module of it; see `peer_module`."""
    return peer_module(name)


def open_clip_module(name: str = "open_clip") -> Any:
    """A module of open_clip; see `peer_module`."""
    return peer_module(name)


def clip_benchmark_module(name: str) -> Any:
    """A module of CLIP_benchmark."""
    pytest.importorskip("clip_benchmark", reason="clip_benchmark is not installed", exc_type=ImportError)
    return importlib.import_module(name)


def peer_module(name: str) -> Any:
    """A module of a package that looks for torchvision, of which no build belongs to the pinned torch."""
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    package = name.partition(".")[0]
    pytest.importorskip(package, reason=f"{package} is not installed", exc_type=ImportError)
    return importlib.import_module(name)
