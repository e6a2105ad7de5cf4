"""What the documents tell a reader to run does run; what they point to is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fastclip.data.demo import write_demo
from fastclip.models import create_model, save_model

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


LONG = ("tutorial.md", "how_tos")  # a process for each of their blocks


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), flags=re.DOTALL)


WITH_PYTHON = [
    pytest.param(document, marks=[pytest.mark.long] * any(part in document.parts for part in LONG))
    for document in DOCUMENTS
    if blocks(document, "python")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as the documents assume it: a trained run and a picture."""
    directory = tmp_path_factory.mktemp("reader")
    write_demo(directory / "data" / "demo", scenes=20, workers=1)
    model = create_model("debug")
    save_model(directory / "runs" / "demo", model, model.config)
    shutil.copy(directory / "data" / "demo" / "tokenizer.json", directory / "runs" / "demo")
    Image.new("RGB", (90, 70)).save(directory / "picture.png")
    return directory


@pytest.mark.parametrize("document", WITH_PYTHON, ids=lambda path: path.name)
def test_python_blocks_run(document: Path, folder: Path) -> None:
    for block in blocks(document, "python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_the_notebook_runs(folder: Path) -> None:
    notebook = json.loads((ROOT / "docs" / "first_steps.ipynb").read_text())
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "64 of 64 images find their sentence" in done.stdout
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "its outputs are those of whoever runs it"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} points to {target}"


def test_the_readme_is_short_and_plain() -> None:
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 130
    assert (
        lines.index(
            "make demo    # trains a small CLIP on real digits and rendered scenes, evaluates it, writes "
            "runs/demo/report.html"
        )
        < 10
    )
    assert text.isascii()


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:`|^|DEMO_MINUTES=\d+ )make ([a-z-]+)", document.read_text(), flags=re.MULTILINE))
        assert named <= targets, f"{document.name}: {named - targets}"
