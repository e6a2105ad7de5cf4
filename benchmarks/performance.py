"""`python -m benchmarks.performance`: the tables in docs/performance.md, from the committed CSVs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import offline, predict, rows
from benchmarks.table import GPU, ROOT

DOCUMENT = ROOT / "docs" / "performance.md"
ARCHITECTURES = {"80": "A100", "90": "H100, H200", "100": "B200"}


def offline_table(compiled: Sequence[offline.Row]) -> str:
    """One line a kernel and architecture: the largest of its configurations, and what its products run on."""
    kernels: dict[tuple[str, str, str], list[offline.Row]] = {}
    for row in compiled:
        kernels.setdefault((row["op"], row["kernel"], row["capability"]), []).append(row)
    lines = ["| op | kernel | for | configurations | registers | spilled | shared memory | products on | TMA |"]
    lines.append("|" + "---|" * 9)
    for (op, kernel, capability), found in kernels.items():
        most = {name: max(int(row[name]) for row in found) for name in ("registers", "spilled_bytes", "shared_bytes")}
        kinds = sorted({row["tensor_core"] for row in found if row["tensor_core"]})
        copies = sum(int(row["bulk_copies"]) > 0 for row in found)
        cells = [
            f"`{op}`", f"`{kernel}`", f"sm_{capability} ({ARCHITECTURES[capability]})", str(len(found)),
            f"{most['registers']}", f"{most['spilled_bytes']} B", f"{most['shared_bytes'] / 1024:.0f} KiB",
            " or ".join(kinds) or "none", "yes" if copies == len(found) else f"{copies} of them" if copies else "no",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    versions = sorted({row["triton"] for row in compiled})
    return "\n".join([*lines, "", f"{len(compiled)} compiled kernels, triton {', '.join(versions)}."])


def roofline_table(predicted: Sequence[rows.Row], measured: Sequence[rows.Row]) -> str:
    """Every problem of a GPU run: what the roofline of an H200 allows, and what a GPU measured."""
    by_key = {rows.key_of(row): row for row in measured if row["p50_ms"]}
    lines = ["| op | type | shape | phase | limit of an H200 | measured | of the limit |", "|" + "---|" * 7]
    for row in predicted:
        found, limit = by_key.get(rows.key_of(row)), rows.number(row["predicted_ms"])
        if row["phase"] not in ("forward", "both") or not limit:
            continue
        shape = ", ".join(f"{name} {value}" for name, value in json.loads(row["shape_json"]).items())
        time, share = "not yet", ""
        if found is not None:
            time = f"{milliseconds(float(found['p50_ms']))} ({found['machine']})"
            share = f"{100 * limit / float(found['p50_ms']):.0f} %"
        phase = "forward + backward" if row["phase"] == "both" else row["phase"]
        cells = [f"`{row['op']}`", row["dtype"], shape, phase, milliseconds(limit), time, share]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def milliseconds(value: float) -> str:
    """Three digits, in the unit that reads best."""
    scale, unit = (1e-3, "s") if value >= 1000 else (1, "ms") if value >= 0.1 else (1e3, "us")
    return f"{value * scale:.3g} {unit}"


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """The document with each block between its `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        assert text.count(begin) == text.count(end) == 1, f"the document must have one block {name}"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
    return text


def with_blocks(text: str) -> str:
    """The document with what the CSVs say."""
    return filled(
        text,
        {
            "offline": offline_table(offline.read()),
            "roofline": roofline_table(rows.read(predict.FILE), rows.read(Path(GPU))),
        },
    )


def main() -> None:
    DOCUMENT.write_text(with_blocks(DOCUMENT.read_text()))
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
