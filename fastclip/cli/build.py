"""`fastclip build`: the C++ and CUDA kernels, compiled into the package."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from fastclip.cli.options import parse
from fastclip.errors import UserError


@dataclass(frozen=True)
class Build:
    """Compile the kernels of csrc/ into the package: faster on the CPU and on Hopper.

    Takes a minute or two; needs a C++ compiler and a checkout of the sources.

    The losses' kernels for H100 and H200 are built where there is an nvcc, too.

    Example: fastclip build
    """


def main(arguments: Sequence[str]) -> None:
    """See `Build`."""
    parse(Build, "build", arguments)
    from fastclip.ops import _cuda, _extension

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
    _build_gpu(_cuda)


def _build_gpu(kernels: ModuleType) -> None:
    """Nothing but a line where that cannot be: all but the speed of a Hopper GPU is there without."""
    reason = kernels.missing()
    if reason is not None:
        print(f"The GPU kernels are left out: {reason}")
        return
    print("Compiling the GPU kernels (half a minute)", flush=True)
    start = time.monotonic()
    kernels.build()
    print(f"Built {kernels.LIBRARY} in {time.monotonic() - start:.0f} s")
    library = kernels.load()
    if isinstance(library, str):
        raise RuntimeError(f"built, but it cannot be used: {library}")
