"""The documents as a site, the blocks that need the drop-ins' libraries, and every command that is shown."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from peers import peer_module

from fastclip.cli.main import VERBS, main
from fastclip.training.__main__ import parse as parse_training

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TRAIN = ("fastclip.training", "fastclip.training.launch")


RUN = "import sys; from fastclip.cli.main import main; sys.exit(main(sys.argv[1:]))"


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), flags=re.DOTALL)


def commands(document: Path) -> list[str]:
    """Every line of a plain block, and every `code`, that calls us; comments and continuations resolved."""
    lines: list[str] = []
    for block in re.findall(r"```(?:sh)?\n(.*?)```", document.read_text(), flags=re.DOTALL):
        lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL))
    ours = r"^(\w+=\S+ )*(srun )?(fastclip|deepspeed|torchrun|python -m) "
    found = [line.partition("  #")[0].strip() for line in lines]
    return [
        line for line in found if re.search(ours, line) and re.search("fastclip|benchmarks", line) and _is_whole(line)
    ]


def _is_whole(command: str) -> bool:
    """Not a pattern such as `fastclip data stats SHARDS`, nor a name alone."""
    words = re.sub(r"DS_ACCELERATOR|SLURM_\w+", "", command)
    return not re.search(r"\b[A-Z]{3,}|\.\.\.|--help|--version", words) and len(command.split()) > 1


ALL_COMMANDS = [(document, line) for document in DOCUMENTS for line in commands(document)]


def arguments_of(command: str) -> tuple[str, list[str]]:
    """(verb, its arguments): "train" for all ways to train, "-m MODULE" for other modules."""
    words = shlex.split(re.sub(r"\$\([^)]*\)|\$\w+", "1", command))
    if "-m" in words or "--module" in words:
        place = next(place for place, word in enumerate(words) if word in ("-m", "--module"))
        module, rest = words[place + 1], words[place + 2 :]
        return ("train" if module in TRAIN else f"-m {module}"), rest
    words = words[words.index("fastclip") + 1 :]
    length = 2 if words[0] == "data" else 1
    return " ".join(words[:length]), words[length:]


@functools.cache
def shown_by(verb: str) -> str:
    """The help of a verb."""
    page = io.StringIO()
    with contextlib.redirect_stdout(page):
        assert main([*verb.split(), "--help"]) == 0
    return page.getvalue()


@pytest.mark.parametrize(("document", "command"), ALL_COMMANDS, ids=lambda x: x.name if isinstance(x, Path) else x[:60])
def test_every_command_exists_and_knows_its_options(document: Path, command: str) -> None:
    verb, arguments = arguments_of(command)
    if verb == "train":
        parse_training([x for x in arguments if x not in ("--resume", "latest")])
    elif verb.startswith("-m "):
        assert importlib.util.find_spec(verb[3:]) is not None, command
    else:
        assert verb in VERBS, f"{document.name}: {command}"
        options = [x.partition("=")[0] for x in arguments if x.startswith("--")]
        assert all(option in shown_by(verb) for option in options), command


PEER_BLOCKS = [(document, block) for document in DOCUMENTS for block in blocks(document, "py")]


@pytest.mark.peer
@pytest.mark.parametrize(("document", "block"), PEER_BLOCKS, ids=lambda x: x.name if isinstance(x, Path) else None)
def test_blocks_for_other_libraries_run(document: Path, block: str, tmp_path: Path) -> None:
    for name in ("open_clip", "transformers", "sentence_transformers", "timm", "accelerate", "lightning"):
        peer_module(name)
    if block.startswith("# train.py"):  # begins a training of open_clip's: its imports must be there
        imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
        assert all(importlib.util.find_spec(node.module or "") for node in imports)
        return
    prelude = (
        "import sys, types\n"
        "sys.modules['torchvision._meta_registrations'] = types.ModuleType('torchvision._meta_registrations')\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", prelude + block]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_there_are_blocks_and_commands() -> None:
    assert len(PEER_BLOCKS) >= 8
    assert len(ALL_COMMANDS) >= 20


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference.html").read_text()
    assert "image_features" in page
    assert (tmp_path / "site" / "how_tos" / "lit.html").is_file()


@pytest.mark.long
def test_the_tutorial_runs_from_top_to_bottom(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    ran, said = [], ""
    for language, block in re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL):
        steps = [["-c", block]] if language == "python" else [
            ["-c", RUN, *shlex.split(line)[1:]] for line in block.splitlines() if line.startswith("fastclip")
        ]  # fmt: skip
        for step in steps:
            if "serve" in step:  # until Ctrl-C
                continue
            done = subprocess.run([sys.executable, *step], cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"
            ran, said = [*ran, step[2] if len(step) > 2 else "python"], said + done.stdout
    assert ran == ["data", "python", "python", "data", "train", "eval", "index", "search", "python"]
    assert (tmp_path / "runs/mine/report.html").is_file()
    assert "images/" in said or ".png" in said  # the search names what it found
