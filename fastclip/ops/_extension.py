"""The compiled CPU kernels of csrc/: their sources and flags, how they are built, and how they are loaded.

setup.py and `fastclip build` compile the same sources with the same flags: on x86-64 once for AVX-512, and everywhere
once for all other processors (see csrc/cpu/simd.h), so that a wheel runs on any machine of its architecture. Nothing is
compiled or loaded at import. setup.py runs this file by its path, so it imports nothing of the package.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
SOURCES = (
    "csrc/bindings.cpp",
    "csrc/cpu/activation.cpp",
    "csrc/cpu/attention.cpp",
    "csrc/cpu/contrastive_loss.cpp",
    "csrc/cpu/layer_norm.cpp",
    "csrc/cpu/sigmoid_loss.cpp",
)
WIDE = "_C_avx512"  # the library for AVX-512; the other one is _C
FLAGS = ("-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-attributes")


def missing() -> str | None:
    """What is missing to build the kernels, in one line, or None."""
    if not all((ROOT / source).exists() for source in SOURCES):
        return f"the sources are not in {ROOT / 'csrc'} (an installed wheel has none: build from a checkout)"
    if shutil.which("c++") is None and shutil.which("g++") is None:
        return "there is no C++ compiler (apt-get install g++)"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported in this environment ({error})"
    return None


def extensions(root: str = "") -> list[Any]:
    """The setuptools Extensions of csrc/; `root` is put before their paths, which are relative to the checkout."""
    from torch.utils.cpp_extension import CppExtension

    flags: dict[str, tuple[str, ...]] = {"_C": FLAGS}
    if platform.machine() in ("x86_64", "AMD64"):
        flags[WIDE] = (*FLAGS, "-march=x86-64-v4")
    sources = [str(Path(root, source)) for source in SOURCES]
    headers = [str(Path(root, path.relative_to(ROOT))) for path in sorted((ROOT / "csrc").rglob("*.h"))]
    return [
        CppExtension(f"fastclip.{name}", sources, depends=headers, extra_compile_args=list(options))
        for name, options in flags.items()
    ]


def build() -> list[Path]:
    """Compiles csrc/ into the package, about a minute, and returns the libraries' paths.

    Raises:
        RuntimeError: something is missing, or the compiler failed.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"the compiled kernels cannot be built: {reason}")
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension

    with tempfile.TemporaryDirectory() as temporary:
        distribution = Distribution({"name": "fastclip", "ext_modules": extensions(str(ROOT))})
        command = BuildExtension(distribution)
        command.build_lib, command.build_temp = str(ROOT), temporary
        command.ensure_finalized()
        command.run()
    load.cache_clear()
    return [Path(command.get_ext_fullpath(one.name)) for one in distribution.ext_modules]


@cache
def load() -> str | None:
    """Loads the library, once per process; returns the reason it cannot be used, or None."""
    import torch

    is_wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    libraries = [*PACKAGE.glob(f"{WIDE}.*so")] * is_wide + [*PACKAGE.glob("_C.*so")]
    if not libraries:
        return "the compiled kernels are not built (run `fastclip build`)"
    library = libraries[0]
    try:
        torch.ops.load_library(str(library))
        built_for = torch.ops.fastclip_cpu.torch_version()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"{library.name} cannot be loaded ({str(error).splitlines()[0]}): run `fastclip build`"
    if built_for != torch.__version__.split("+")[0]:
        return f"{library.name} was built for torch {built_for}, this is {torch.__version__}: run `fastclip build`"
    return None


def why_not() -> str | None:
    """`load`, where only its answer matters."""
    return load()
