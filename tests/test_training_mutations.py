"""Every chunk, rank and scale gradient that is dropped or doubled is noticed in the weights, at every ZeRO stage."""

from __future__ import annotations

import pytest
from mutations_training import survivors


@pytest.mark.long
def test_no_mutation_survives() -> None:
    assert survivors() == []
