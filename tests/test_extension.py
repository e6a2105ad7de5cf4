"""Building csrc/: the sources, the reasons it is left out, and what is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastclip.ops import _extension

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    _extension.load.cache_clear()
    yield
    _extension.load.cache_clear()


def test_every_source_is_listed() -> None:
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")}
    assert found == set(_extension.SOURCES)


def test_what_was_built_loads() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert _extension.load() is None
    assert torch.__version__.startswith(torch.ops.fastclip_cpu.torch_version())


def test_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path)
    assert "not built (run `fastclip build`)" in str(_extension.load())
    _extension.load.cache_clear()
    (tmp_path / "_C.so").write_bytes(b"not a library")
    assert "_C.so cannot be loaded" in str(_extension.load())
    monkeypatch.setattr(_extension, "ROOT", tmp_path)
    assert "the sources are not in" in str(_extension.missing())
    with pytest.raises(RuntimeError, match="cannot be built: the sources are not in"):
        _extension.build()


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ("AVX512", ("_C_avx512", "_C"), "_C_avx512"),
        ("AVX512", ("_C",), "_C"),
        ("AVX2", ("_C_avx512", "_C"), "_C"),
        ("AVX2", ("_C_avx512",), None),
    ],
)
def test_the_library_for_this_processor_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: str, built: tuple[str, ...], expected: str | None
) -> None:
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name in built:
        (tmp_path / f"{name}.so").write_bytes(b"not a library")
    reason = f"{expected}.so cannot be loaded" if expected else "the compiled kernels are not built"
    assert str(_extension.load()).startswith(reason)


def test_without_a_compiler_setup_leaves_the_kernels_out(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "setup.py"), "--name"]
    result = subprocess.run(command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "the compiled CPU kernels are left out, everything else works: there is no C++ compiler" in result.stderr


@pytest.mark.long
def test_build_makes_a_library_that_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(_extension, "ROOT", tmp_path)
    monkeypatch.setattr(_extension, "platform", types.SimpleNamespace(machine=lambda: "any"))  # wheels hold both
    monkeypatch.setattr(_extension, "FLAGS", ("-O0", *_extension.FLAGS[1:]))  # a wheel is built with them as they are
    (library,) = _extension.build()
    assert library.parent == tmp_path / "fastclip"
    assert library.stat().st_size > 100_000
    code = (
        "from pathlib import Path; from fastclip.ops import _extension;"
        f"_extension.PACKAGE = Path({str(tmp_path / 'fastclip')!r});"
        "reason = _extension.load(); assert reason is None, reason"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
