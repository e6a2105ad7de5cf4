"""`python -m benchmarks.agree A.csv B.csv`: whether two runs on one machine found the same ratios.

All count but those of the baseline to itself; one that stands in one file only agrees with nothing. Exit 1 where fewer
than 95 % are within 10 % of each other, or any is more than 25 % away.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import rows
from fastclip.errors import UserError

NEAR, FAR, SHARE = 0.10, 0.25, 0.95

Ratios = dict[tuple[str, ...], float]


def ratios(measured: Sequence[rows.Row]) -> Ratios:
    """By key and baseline."""
    found = {(*rows.key_of(row), row["baseline"]): rows.number(row["ratio"]) for row in measured}
    return {key: ratio for key, ratio in found.items() if ratio and key[1] != key[-1]}


def deviations(first: Ratios, second: Ratios) -> Ratios:
    """The larger over the smaller, less 1, of what stands in both; the farthest first."""
    both = {key: max(first[key], second[key]) / min(first[key], second[key]) - 1 for key in first if key in second}
    return dict(sorted(both.items(), key=lambda item: -item[1]))


def compare(first: Path, second: Path) -> tuple[bool, list[str]]:
    """Whether they agree, and what there is to say of it.

    Raises:
        UserError: rows of several machines, or no ratio that stands in both.
    """
    measured = {path: rows.read(path) for path in (first, second)}
    names = {path: ", ".join(sorted(rows.machines(found))) or "no machine" for path, found in measured.items()}
    if len(rows.machines(measured[first]) | rows.machines(measured[second])) > 1:
        told = f"{first} is of {names[first]}; {second} is of {names[second]}"
        raise UserError(f"{told}: ratios are compared on one machine only")
    before, after = (ratios(found) for found in measured.values())
    off = deviations(before, after)
    if not off:
        raise UserError(f"{first} and {second} have no ratio in common: {len(before)} and {len(after)} of their own")
    alone = {key: first if key in before else second for key in {**before, **after} if key not in off}
    total, near, worst = len(off) + len(alone), sum(x <= NEAR for x in off.values()), max(off.values())
    share = f"{near} ({100 * near / total:.1f} %) within 10 %"
    lines = [f"{total} ratios, {share}, the farthest is {100 * worst:.1f} % away"]
    for key, x in off.items():
        if x > NEAR:
            lines.append(f"  {100 * x:5.1f} %  {before[key]:g} and {after[key]:g}  {' '.join(key[:-1])}")
    lines += [f"  only in {path}: {' '.join(key[:-1])}, beside {key[-1]}" for key, path in alone.items()]
    return near >= SHARE * total and worst <= FAR, lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agree", description=__doc__)
    parser.add_argument("first", type=Path, metavar="A.csv")
    parser.add_argument("second", type=Path, metavar="B.csv")
    options = parser.parse_args(arguments)
    try:
        is_same, lines = compare(options.first, options.second)
    except UserError as error:
        print(f"benchmarks.agree: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
