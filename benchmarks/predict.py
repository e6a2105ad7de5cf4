"""`python -m benchmarks.predict`: the GPU's problems on an H200, as the roofline has them, for a run to stand beside.

The rows are those a GPU run writes for impl "auto", with nothing where it measures.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import rows
from benchmarks.case import PHASES
from benchmarks.cases import CASES
from benchmarks.machine import Roofline

FILE = Path(__file__).parent / "results" / "h200_predicted.csv"
# What products in 16 bits and copies reach on an H200. In fp32 exact products run on the other units, of 67 TFLOP/s.
H200 = {"float16": Roofline(790e12, 4.3e12), "bfloat16": Roofline(790e12, 4.3e12), "float32": Roofline(67e12, 4.3e12)}
MACHINE = "NVIDIA H200, predicted"


def predicted_rows() -> list[rows.Row]:
    written = []
    for case in CASES.values():
        for problem in case.problems("cuda"):
            for phase in PHASES:
                roof = H200[problem.dtype]
                milliseconds = roof.milliseconds(case.operations(problem, phase), case.traffic(problem, phase))
                written.append(
                    rows.make_row(
                        op=case.op, impl="auto", device="cuda", dtype=problem.dtype, shape_json=problem.shape_json,
                        phase=phase, predicted_ms=milliseconds, machine=MACHINE,
                    )
                )  # fmt: skip
    return written


def main() -> None:
    FILE.unlink(missing_ok=True)
    rows.append(FILE, predicted_rows())
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
