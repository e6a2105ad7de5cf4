"""Every mutation of the losses turns a test red."""

from __future__ import annotations

import pytest
from mutations_losses import survivors


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_no_mutation_survives() -> None:
    assert survivors() == []
