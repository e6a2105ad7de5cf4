"""The properties of the data room, tried on many times the examples of `make test-all`, new ones each time.

    python tests/fuzz_data.py [20]

Hostile tars and images, exactly-once and resume over random runs, tokenizers on any text. A failure prints the smallest
example that fails.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    os.environ["TIMES_THE_EXAMPLES"] = sys.argv[1] if len(sys.argv) > 1 else "20"
    here = Path(__file__).parent
    files = ("test_data_hostile.py", "test_data_order.py", "test_data_tokenizer.py", "test_data_tokenizer_peer.py")
    sys.exit(pytest.main(["--timeout=0", *(str(here / name) for name in files)]))
