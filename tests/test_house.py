"""The house rules of CONTRIBUTING.md: which room may import which, file sizes, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastclip"

# room -> the rooms it may import; a room is a top-level module or folder of the package
ARROWS: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "ops": {"errors"},
    "distributed": {"errors"},
    "grad_cache": {"distributed", "errors"},
    "losses": {"ops", "distributed", "errors"},
    "models": {"ops", "errors", "_version"},
    "data": {"ops", "errors"},
    "evaluation": {"models", "data", "ops", "distributed", "errors"},
    "report": {"errors"},
    "training": {
        "losses",
        "grad_cache",
        "models",
        "data",
        "evaluation",
        "report",
        "distributed",
        "ops",
        "errors",
        "_version",
    },
    "testing": {"ops", "errors"},
}
ON_TOP = {"cli", "interop", "__init__", "__main__"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            base = node.module or ""
            names = [f"fastclip.{alias.name}" for alias in node.names] if base == "fastclip" else [base]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("fastclip.")}
    return {name for name in rooms if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    here = room(path)
    if here in ON_TOP:
        return
    assert here in ARROWS, f"{here} is a new room: give it its arrows"
    wrong = imported_rooms(path) - ARROWS[here] - {here}
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}; {here} may import {sorted(ARROWS[here])}"


def test_arrows_have_no_circle() -> None:
    seen: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in seen:
            for target in ARROWS[name]:
                visit(target, (*path, name))
            seen.append(name)

    for name in ARROWS:
        visit(name, ())


@pytest.mark.parametrize(
    "path", modules() + sorted((ROOT / "csrc").rglob("*.*")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_files_stay_small_and_ascii(path: Path) -> None:
    text = path.read_text()
    kernel = path.name.startswith("triton") or path.suffix != ".py"
    assert len(text.splitlines()) <= (500 if kernel else 420)
    assert text.isascii(), f"{path}: ASCII only"


def test_import_costs_torch_only() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fastclip; "
        "heavy = {'triton', 'deepspeed', 'PIL', 'tyro', 'sklearn', 'matplotlib', 'tokenizers', 'yaml'}; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "assert not (heavy & new), heavy & new; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
