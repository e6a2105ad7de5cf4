"""`python -m benchmarks`: measures the cases and appends rows to a CSV."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import machine, rows
from benchmarks.base import prepare
from benchmarks.case import Case, Problem
from benchmarks.cases import CASES
from benchmarks.harness import DeviceLost, Measurement, Run
from fastclip.errors import UserError

RESULTS = Path(__file__).parent / "results"
RECORDED = RESULTS / "quick.csv"
SLOWER = 0.8  # a ratio below this part of the recorded one is reported
SECONDS, QUICK_SECONDS = 6.0, 0.5  # of rounds for each problem
LEAST_ROUNDS, ENOUGH_SECONDS = 7, 90.0  # of a problem that is refined, before the others get more
LOST = 3  # exit status: the GPU's context is dead, a new process may go on


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where --quick found a case slower than recorded; 2 for a mistake; 3 where the GPU was lost."""
    try:
        return _run(_parser().parse_args(arguments))
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--case", action="append", help=f"one of {', '.join(CASES)}; may be given again (all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks.csv"), help="rows are added to it")
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds; compares with the recorded ratios")
    parser.add_argument("--recorded", type=Path, default=RECORDED, help="what --quick compares with")
    parser.add_argument("--time-budget", type=float, metavar="S", help="begin no problem after S seconds")
    parser.add_argument("--refine", action="store_true", help="spend what is left of it on more rounds of each problem")
    parser.add_argument("--seconds", type=float, help=f"of rounds at a time ({SECONDS:g}; quick {QUICK_SECONDS})")
    parser.add_argument("--base", metavar="REV", help="measure that commit in the same rounds; it is the baseline then")
    parser.add_argument("--start", type=int, default=0, metavar="K", help="leave out the first K problems")
    parser.add_argument("--resume", action="store_true", help="leave out what has rows in --out")
    return parser


def problems_of(names: Sequence[str] | None, device: str, is_quick: bool) -> list[tuple[Case, Problem]]:
    """The most valuable first, over all ops.

    Raises:
        UserError: a name that is no case.
    """
    unknown = sorted(set(names or ()) - set(CASES))
    if unknown:
        raise UserError(f"--case is {unknown[0]!r}, must be one of {', '.join(CASES)}")
    cases = [CASES[name] for name in names or CASES]
    chosen = [(case, problem) for case in cases for problem in (case.quick if is_quick else case.problems)(device)]
    return sorted(chosen, key=lambda pair: pair[1].rank)


def _run(options: argparse.Namespace) -> int:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, must be cpu: torch sees no GPU")
    if options.refine and options.time_budget is None:
        raise UserError("--refine needs --time-budget: how long to go on")
    machine.settle_allocator()
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    base = prepare(options.base) if options.base else None
    run = Run(options.out, seconds, options.quick, options.refine, base)
    earlier = rows.read(options.out) if options.resume else []
    run.failed = {rows.key_of(row)[:5] for row in earlier if not row["p50_ms"] and not row["peak_mb"]}
    finished = {(row["op"], *rows.key_of(row)[2:5]) for row in earlier if row["p50_ms"] or row["peak_mb"]}
    chosen, start, written, begun = problems_of(options.case, device, options.quick), time.monotonic(), [], []
    for number, (case, problem) in enumerate(chosen):
        spent = time.monotonic() - start
        if number < options.start or (case.op, problem.device, problem.dtype, problem.shape_json) in finished:
            continue
        if options.time_budget is not None and spent > options.time_budget:
            print(f"the time is up: {len(chosen) - number} of {len(chosen)} problems left out", flush=True)
            break
        print(f"[{number + 1}/{len(chosen)}] {case.op} {problem.label}, {spent:.0f} s", flush=True)
        measurement = Measurement(case, problem, run)
        try:
            measured = measurement.look()
        except DeviceLost as error:
            print(f"the GPU is lost: {error}", flush=True)
            return LOST
        for row in measured:
            _print(row)
        written += measured
        if options.refine:
            begun.append(measurement)
        else:
            measurement.close()
    try:
        refine(begun, start + (options.time_budget or 0))
    except DeviceLost as error:
        print(f"the GPU is lost: {error}", flush=True)
        return LOST
    recorded = rows.read(options.recorded) if options.quick else []
    here, there = rows.machines(written), rows.machines(recorded)
    if here and there and not here & there:
        named = f"{options.recorded} is of {', '.join(sorted(there))}, this is {', '.join(here)}"
        print(f"not compared with what was recorded: {named}", flush=True)
    slower = slower_than_recorded(written, recorded)
    for line in slower:
        print(line, flush=True)
    return 1 if slower else 0


def refine(begun: Sequence[Measurement], end: float) -> None:
    """More looks at each problem, always the one that had the least, until `end` of the monotonic clock.

    What disturbs a machine for a minute is then a small part of every problem's rounds, not all of one's.
    """
    left, looks = [measurement for measurement in begun if measurement.rounds], 0
    while left:
        least = min(left, key=lambda one: (_has_enough(one), one.seconds))
        if time.monotonic() + max(least.run.seconds, least.seconds / least.rounds) > end:
            left.remove(least)
            continue
        least.look()
        looks += 1
    if looks:
        print(f"looked {looks} more times; the rows of all rounds:", flush=True)
    for measurement in begun if looks else ():
        print(f"{measurement.case.op} {measurement.problem.label}, {measurement.rounds} rounds", flush=True)
        for row in measurement.rows():
            _print(row)


def _has_enough(measurement: Measurement) -> bool:
    return measurement.rounds >= LEAST_ROUNDS or measurement.seconds >= ENOUGH_SECONDS


def slower_than_recorded(measured: Sequence[rows.Row], recorded: Sequence[rows.Row]) -> list[str]:
    """A line for each of our cases whose ratio is more than 20 % below the one recorded on the same machine."""
    here = rows.machines(measured)
    before = {rows.key_of(row): rows.number(row["ratio"]) for row in recorded if rows.machines([row]) <= here}
    lines = []
    for row in measured:
        ratio, was = rows.number(row["ratio"]), before.get(rows.key_of(row))
        if row["impl"] == "auto" and row["phase"] == "both" and ratio and was and ratio < SLOWER * was:
            what = f"{row['op']} {row['dtype']} {row['shape_json']}"
            lines.append(f"slower: {what} is {ratio:.2f} times as fast as {row['baseline']}, was {was:.2f}")
    return lines


def _print(row: rows.Row) -> None:
    if row["phase"] != "both":
        return
    parts = [f"  {row['impl']:14}"]
    if row["p50_ms"]:
        parts.append(f"{row['p50_ms']:>8} ms")
    if row["ratio"]:
        parts.append(f"{row['ratio']:>6} x {row['baseline']}")
    if row["peak_mb"]:
        parts.append(f"{row['peak_mb']:>6} MiB")
    print("  ".join([*parts, f"error {row['error']} of {row['budget']}", row["peer_version"]]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
