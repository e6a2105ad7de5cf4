"""30 kills at random instants; `python tests/kills.py` does 200."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import survive


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "saves"), [("torch", "save_every"), ("deepspeed", "save_every"), ("deepspeed", "snapshot_every")]
)
def test_ten_kills_lose_nothing(tmp_path: Path, engine: str, saves: str) -> None:
    assert survive(tmp_path, 10, engine, seed=1, saves=saves) == ""
