"""What docs/performance.md says is what the CSVs say, and the compiled kernels are those of the code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import offline, performance

ROOT = Path(__file__).parent.parent


def test_the_tables_in_the_document_are_what_the_rows_say() -> None:
    text = performance.DOCUMENT.read_text()
    assert performance.with_blocks(text) == text, "run python -m benchmarks.performance"


def test_every_configuration_of_the_code_is_in_the_rows() -> None:
    recorded = {tuple(row[name] for name in offline.KEY) for row in offline.read()}
    wanted = {tuple(named[name] for name in offline.KEY) for named, _ in offline.configurations()}
    assert recorded == wanted, "run python -m benchmarks.offline, then python -m benchmarks.performance"


def test_nothing_spills_and_products_run_on_tensor_cores() -> None:
    compiled = offline.read()
    assert offline.faults(compiled) == []
    for row in compiled:
        types = json.loads(row["types"])
        operand = types.get("image", "fp32") if row["op"] != "attention" else types.get("qkv_ptr", "fp32")
        if "fp32" not in operand:  # of a loss, of attention; else there is no product, or an exact one
            assert int(row["products"]) > 0, row


def test_faults_are_told() -> None:
    row = offline.read()[0]
    assert "spills 8 bytes" in offline.faults([row | {"spilled_bytes": "8"}])[0]
    assert "shared memory" in offline.faults([row | {"shared_bytes": str(300 << 10)}])[0]


def test_a_measurement_stands_beside_its_limit() -> None:
    predicted = {
        "op": "contrastive_loss", "impl": "auto", "device": "cuda", "dtype": "float16", "phase": "both",
        "shape_json": '{"n": 4, "d": 2}', "predicted_ms": "5.5",
    }  # fmt: skip
    measured = predicted | {"p50_ms": "11.0", "machine": "a GPU"}
    assert "| not yet |" in performance.roofline_table([predicted], [])
    assert "| n 4, d 2 | forward + backward | 5.5 ms | 11 ms (a GPU) | 50 % |" in performance.roofline_table(
        [predicted], [measured]
    )


@pytest.mark.long
def test_the_rows_are_what_compiling_again_gives(tmp_path: Path) -> None:
    """One op; the others compile without spills in their own tests."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.offline", "--op", "sigmoid_loss", "--out"]
    out = tmp_path / "offline.csv"
    done = subprocess.run([*command, str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    recorded = [row for row in offline.read() if row["op"] == "sigmoid_loss"]
    assert offline.read(out) == recorded
