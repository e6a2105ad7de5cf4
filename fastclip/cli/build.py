"""`fastclip build`: the C++ kernels, compiled into the package."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fastclip.cli.options import parse
from fastclip.errors import UserError


@dataclass(frozen=True)
class Build:
    """Compile the C++ kernels of csrc/ into the package: faster training on the CPU.

    Takes a minute or two; needs a C++ compiler and a checkout of the sources.

    Example: fastclip build
    """


def main(arguments: Sequence[str]) -> None:
    """See `Build`."""
    parse(Build, "build", arguments)
    from fastclip.ops import _extension

    reason = _extension.missing()
    if reason is not None:
        raise UserError(f"the kernels cannot be built: {reason}")
    print(f"Compiling {', '.join(_extension.SOURCES)} (a minute or two)", flush=True)
    start = time.monotonic()
    libraries = _extension.build()
    print(f"Built {', '.join(map(str, libraries))} in {time.monotonic() - start:.0f} s")
    reason = _extension.load()
    if reason is not None:
        raise RuntimeError(f"built, but it cannot be used: {reason}")
