"""`python -m benchmarks.table`: the tables in docs/losses.md, between their markers, from the committed CSVs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import predict, rows
from benchmarks.cases import LOSSES
from benchmarks.harness import GIB

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "losses.md"
RESULTS = Path(__file__).parent / "results"
MEASURED, GPU = RESULTS / "cpu.csv", RESULTS / "cuda.csv"
EMPTY = "No rows yet: `make bench` measures them."
BASELINES = ("open_clip", "eager")


def measured_table(measured: Sequence[rows.Row]) -> str:
    """Ours beside eager code and torch.compile of it, one line a problem; forward + backward."""
    problems: dict[tuple[str, ...], dict[str, rows.Row]] = {}
    for row in measured:
        if row["op"] in LOSSES and row["phase"] == "both" and (row["p50_ms"] or row["peak_mb"]):
            problems.setdefault((row["op"], row["dtype"], row["shape_json"]), {})[row["impl"]] = row
    if not problems:
        return EMPTY
    heads = ["loss", "features", "N x D", "eager", "compiled", "ours", "times as fast"]
    heads += ["memory, eager", "ours", "error, eager", "ours"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for (op, dtype, shape_json), by_impl in sorted(problems.items(), key=_order):
        eager = next((by_impl[name] for name in BASELINES if name in by_impl), None)
        ours, compiled = by_impl.get("auto"), by_impl.get("compile")
        if ours is None:
            continue
        sizes = json.loads(shape_json)
        cells = [
            f"`{op}`", dtype, f"{sizes['n']} x {sizes['d']}", *(_time(row) for row in (eager, compiled, ours)),
            f"**{float(ours['ratio']):.2f}**" if ours["ratio"] else "",
            *(_memory(row) for row in (eager, ours)), *(_error(row) for row in (eager, ours)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    machines = sorted({f"{row['machine']}, torch {row['torch']}, commit {row['commit']}" for row in measured})
    peers = sorted({row["peer_version"] for row in measured if row["impl"] in BASELINES})
    lines += ["", *(f"{line}\n" for line in _left_out(measured))]
    return "\n".join([*lines, f"Measured on {'; '.join(machines)}. Eager is {', '.join(peers)}."])


def _left_out(measured: Sequence[rows.Row]) -> list[str]:
    """A sentence for each type and reason that problems of the losses have no figures for."""
    ours = [row for row in measured if row["op"] in LOSSES and row["impl"] == "auto"]
    reasons = {(row["dtype"], row["error"]) for row in ours if row["error"].startswith("not run: ")}
    return [f"{dtype} {reason}." for dtype, reason in sorted(reasons)]


def predicted_table(predicted: Sequence[rows.Row], measured: Sequence[rows.Row]) -> str:
    """The roofline of an H200 beside what a GPU run measured."""
    by_key = {rows.key_of(row): row for row in measured if row["p50_ms"]}
    lines = ["| loss | features | N x D | the roofline of an H200 | measured |", "|" + "---|" * 5]
    for row in predicted:
        if row["op"] not in LOSSES or row["phase"] != "both":
            continue
        sizes, found = json.loads(row["shape_json"]), by_key.get(rows.key_of(row))
        time = "not yet" if found is None else f"{_time(found)} ({found['machine']})"
        size = f"{sizes['n']} x {sizes['d']}"
        lines.append(f"| `{row['op']}` | {row['dtype']} | {size} | {_milliseconds(row['predicted_ms'])} | {time} |")
    return "\n".join(lines)


def _order(item: tuple[tuple[str, ...], object]) -> tuple[object, ...]:
    (op, dtype, shape_json), _ = item
    sizes = json.loads(shape_json)
    return op, dtype != "float32", sizes["d"], sizes["n"]


def _time(row: rows.Row | None) -> str:
    return "" if row is None or not row["p50_ms"] else _milliseconds(row["p50_ms"])


def _milliseconds(text: str) -> str:
    value = float(text)
    if value >= 1000:
        return f"{value / 1e3:.3g} s"
    return f"{value:.3g} ms" if value >= 0.1 else f"{value * 1e3:.2g} us"


def _memory(row: rows.Row | None) -> str:
    if row is None or not row["peak_mb"]:
        return ""
    value = float(row["peak_mb"])
    return f"{value * (1 << 20) / GIB:.3g} GiB" if value >= 1024 else f"{value:.3g} MiB"


def _error(row: rows.Row | None) -> str:
    value = None if row is None else rows.number(row["error"])
    return "" if value is None else f"{value:.1e}"


def with_blocks(text: str) -> str:
    """The document with what the CSVs say between `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    blocks = {
        "measured": measured_table(rows.read(MEASURED)),
        "predicted": predicted_table(rows.read(predict.FILE), rows.read(GPU)),
    }
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        assert text.count(begin) == text.count(end) == 1, f"{DOCUMENT.name} must have one block {name}"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    DOCUMENT.write_text(with_blocks(DOCUMENT.read_text()))
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
