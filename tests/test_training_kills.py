"""20 kills at random instants; `python tests/kills.py` does 200."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import survive


@pytest.mark.long
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_ten_kills_lose_nothing(tmp_path: Path, engine: str) -> None:
    assert survive(tmp_path, 10, engine, seed=1) == ""
