"""Set-up shared by all tests: seeds, one list of admitted skips, and the interpreter where there is no GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from fastclip.losses import small
from fastclip.training.processes import Processes, start_processes, stop_processes

SKIPS = Path(__file__).parent / "skips.txt"
IN_CI = bool(os.environ.get("CI"))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def is_admitted(test: str) -> bool:
    """Whether a line `test id pattern <tab> reason` of skips.txt admits that `test` is skipped.

    In CI, which installs all that it can, a line whose reason begins with "not in CI" admits nothing.
    """
    for line in SKIPS.read_text().splitlines():
        pattern, _, reason = line.partition("\t")
        is_rule = bool(line.strip()) and not line.startswith("#")
        if is_rule and re.search(pattern.strip(), test) and not (IN_CI and reason.startswith("not in CI")):
            return True
    return False


def unlisted_skips(reporter: pytest.TerminalReporter) -> list[str]:
    skipped = {report.nodeid for report in reporter.stats.get("skipped", [])}
    return sorted(test for test in skipped if not is_admitted(test))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that are wholly about peers are not imported by a run without them: peers may not be installed there."""
    if "not peer" in config.getoption("markexpr") and collection_path.suffix == ".py":
        return "\npytestmark = pytest.mark.peer\n" in collection_path.read_text() or None
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for test in unlisted_skips(terminalreporter):
        terminalreporter.write_line(f"skip not listed in {SKIPS.name}: {test}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if IN_CI and session.exitstatus == 0 and reporter and unlisted_skips(reporter):
        session.exitstatus = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """As it was: a run in this process leaves its rank in it, by which other libraries go."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """This one, as the only rank."""
    with patch.dict(os.environ):
        yield start_processes()
        stop_processes()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def without_kept_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses make their logits twice, as they do for batches larger than a test's; `memory_budget` asks for more."""
    monkeypatch.setattr(small, "IN_CACHE", 0)
    monkeypatch.setattr(small, "LAUNCHES", 0)


@pytest.fixture(params=[0, small.IN_CACHE], ids=["two passes", "one call"])
def either_way(monkeypatch: pytest.MonkeyPatch, without_kept_logits: None, request: pytest.FixtureRequest) -> None:
    """As for large batches, and as for small ones."""
    monkeypatch.setattr(small, "IN_CACHE", request.param)
