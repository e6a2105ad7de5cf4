"""Set-up shared by all tests: seeds, one list of admitted skips, and the interpreter where there is no GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

SKIPS = Path(__file__).parent / "skips.txt"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def admitted_skips() -> list[tuple[re.Pattern[str], str]]:
    """Lines `test id pattern  <tab>  reason` of skips.txt; CI fails on a skip that no line admits."""
    lines = [
        line.split("\t", 1) for line in SKIPS.read_text().splitlines() if line.strip() and not line.startswith("#")
    ]
    return [(re.compile(pattern.strip()), reason.strip()) for pattern, reason in lines]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    unlisted = [r for r in skipped if not any(pattern.search(r.nodeid) for pattern, _ in admitted_skips())]
    for report in unlisted:
        terminalreporter.write_line(f"skip not listed in {SKIPS.name}: {report.nodeid}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not os.environ.get("CI"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if session.exitstatus == 0 and any(not any(p.search(r.nodeid) for p, _ in admitted_skips()) for r in skipped):
        session.exitstatus = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
