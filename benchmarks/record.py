"""`python -m benchmarks.record FOLDER`: what `make bench` measured goes to benchmarks/results/ and into docs/losses.md.

Only a whole run does. One that left problems out, since this machine has no bf16 products or the time was up, would
take away what another machine measured: then nothing is changed, and it says why.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plot, rows, table
from benchmarks.__main__ import RECORDED, problems_of
from fastclip.errors import UserError


def left_out(measured: Sequence[rows.Row], is_quick: bool) -> Counter[str]:
    """How many of the CPU's problems have no figures of ours, by the reason."""
    ours: dict[tuple[str, ...], rows.Row] = {}
    for row in measured:
        if row["impl"] == "auto" and row["phase"] == "both":
            ours[row["op"], row["dtype"], row["shape_json"]] = row
    reasons: Counter[str] = Counter()
    for case, problem in problems_of(None, "cpu", is_quick):
        found = ours.get((case.op, problem.dtype, problem.shape_json))
        if found is None:
            reasons["not measured"] += 1
        elif not found["p50_ms"] and not found["peak_mb"]:
            reasons[found["error"]] += 1
    return reasons


def record(folder: Path) -> str:
    """What was done, in words.

    Raises:
        UserError: there is no run in the folder, or matplotlib is not installed.
    """
    files = {folder / "cpu.csv": table.MEASURED, folder / "quick.csv": RECORDED}
    if folder.resolve() == table.RESULTS:
        raise UserError(f"FOLDER is {folder}, must be another one: a run is recorded there once it is whole")
    for file in files:
        if not file.is_file():
            raise UserError(f"FOLDER is {folder}, must be that of a run: it has no {file.name}")
    reasons = left_out(rows.read(folder / "cpu.csv"), False) + left_out(rows.read(folder / "quick.csv"), True)
    if reasons:
        told = "; ".join(f"{count} ({reason})" for reason, count in sorted(reasons.items()))
        return f"kept as they were: {table.RESULTS}, {table.DOCUMENT}. Problems without figures in {folder}: {told}"
    for file, recorded in files.items():
        recorded.unlink(missing_ok=True)
        rows.append(recorded, rows.read(file))
    plot.draw(rows.read(table.MEASURED), table.RESULTS)
    table.main()
    return f"wrote {table.RESULTS}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with cpu.csv and quick.csv")
    try:
        print(record(parser.parse_args(arguments).folder))
    except UserError as error:
        print(f"benchmarks.record: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
