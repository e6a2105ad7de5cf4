"""The CSV: one row for each implementation, problem and phase, written as soon as it is known; a later one counts.

op, impl, device, dtype, shape_json   what ran on what
phase           forward, backward, or both; a reason why nothing was measured stands in the row "both", for a whole
                problem in that of impl "auto"
p50_ms, p20_ms, p80_ms   over the rounds; empty where nothing was timed
peak_mb         MiB above what the inputs and their gradients need (the row "both")
gflops          10^9 operations a second, of the operations that linear memory needs (the same for every impl)
pct_roofline    predicted_ms / p50_ms in percent
predicted_ms    the roofline: operations at the speed of the library's product, or bytes at that of a copy
ratio           time of `baseline` / time, the mean of the middle half of the rounds: above 1 is faster; empty for a
                backward whose work the forward did
peer_version    distribution and version of what ran; for impl "auto" with the implementation it took
error           largest relative error against fp64, of the loss (forward) or a gradient (backward); or the reason
budget          what the error may be
machine, torch, triton, commit   where, with what
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from fastclip.errors import UserError

COLUMNS = (
    "op", "impl", "device", "dtype", "shape_json", "phase", "p50_ms", "p20_ms", "p80_ms", "peak_mb", "gflops",
    "pct_roofline", "predicted_ms", "ratio", "baseline", "peer_version", "error", "budget", "machine", "torch",
    "triton", "commit",
)  # fmt: skip
KEY = ("op", "impl", "device", "dtype", "shape_json", "phase")

Row = dict[str, str]


def make_row(**fields: object) -> Row:
    """A row with "" for what is not given; numbers to four digits.

    Raises:
        KeyError: a field is not a column.
    """
    unknown = set(fields) - set(COLUMNS)
    if unknown:
        raise KeyError(f"no such columns: {sorted(unknown)}")
    return {name: _text(fields.get(name)) for name in COLUMNS}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to the file, which it makes with its header where there is none, and closes it.

    Raises:
        UserError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        _check_header(path)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """The rows of the file in order, of rows with one key the last; none where there is no file.

    Raises:
        UserError: the file has other columns.
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    _check_header(path)
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]  # the last may have been cut off
    return list({key_of(row): row for row in rows}.values())


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def machines(measured: Iterable[Row]) -> set[str]:
    """Their names, without the clocks that a GPU had at that moment."""
    return {row["machine"].partition(", sm ")[0] for row in measured}


def _check_header(path: Path) -> None:
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if tuple(header) != COLUMNS:
        raise UserError(f"{path} has the columns {','.join(header)}; must be {','.join(COLUMNS)}")


def number(text: str) -> float | None:
    """A column's number; None where there is none, or a reason."""
    try:
        return float(text)
    except ValueError:
        return None
