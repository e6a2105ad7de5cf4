"""Builds csrc/ where a compiler and torch are at hand; everything else about the package is in pyproject.toml."""

import runpy
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

kernels = runpy.run_path(str(Path(__file__).parent / "fastclip" / "ops" / "_extension.py"))


def notice(reason: object) -> None:
    print(f"fastclip: the compiled CPU kernels are left out, everything else works: {reason}", file=sys.stderr)


def build_options() -> dict[str, Any]:
    reason = kernels["missing"]()
    if reason is not None:
        notice(reason)
        return {}
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        """Keeps its objects in build/, one folder a library, and compiles only what has changed since."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # whatever the compiler or the linker says, the rest of the package installs
                notice(error)

        def build_extension(self, ext: Any) -> None:
            self.build_temp = str(Path("build", "objects", ext.name))
            super().build_extension(ext)

    return {"ext_modules": kernels["extensions"](), "cmdclass": {"build_ext": OptionalBuild}}


setup(**build_options())
