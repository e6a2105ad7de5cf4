"""The other packages that tests compare with; `make test-all` installs them."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest


def open_clip_module(name: str = "open_clip") -> Any:
    """A module of open_clip; torchvision has no build beside the pinned torch, and its operators are not needed."""
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    pytest.importorskip("open_clip", reason="open_clip is not installed", exc_type=ImportError)
    return importlib.import_module(name)


def clip_benchmark_module(name: str) -> Any:
    """A module of CLIP_benchmark."""
    pytest.importorskip("clip_benchmark", reason="clip_benchmark is not installed", exc_type=ImportError)
    return importlib.import_module(name)
