"""`python -m benchmarks.plot [ROWS.csv ...]`: speed and memory over the size, as SVG beside the CSV."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.cases import LOSSES
from fastclip.errors import UserError

RESULTS = Path(__file__).parent / "results"
QUANTITIES = {
    "p50_ms": ("speed", "forward + backward, ms"),
    "peak_mb": ("memory", "peak above inputs and gradients, MiB"),
}
COLOURS = {
    "auto": "#0b62a4", "open_clip": "#666666", "eager": "#666666", "compile": "#e08214", "base": "#999999",
    "inf_cl": "#1b9e77", "memeff": "#7570b3", "siglip_kernel": "#d95f02", "triton": "#c51b7d", "reference": "#a6761d",
    "dense": "#66a61e", "cpu": "#17becf",
}  # fmt: skip

Curves = dict[str, list[tuple[int, float]]]  # by impl: size and value


def curves(all_rows: Sequence[rows.Row], column: str) -> dict[tuple[str, str, str, int], Curves]:
    """By op, device, dtype and D: what a plot shows of the losses, sizes in order."""
    plots: dict[tuple[str, str, str, int], Curves] = defaultdict(lambda: defaultdict(list))
    for row in all_rows:
        value = rows.number(row[column])
        if row["op"] not in LOSSES or row["phase"] != "both" or value is None or value <= 0:
            continue
        shape = json.loads(row["shape_json"])
        plots[row["op"], row["device"], row["dtype"], shape["d"]][row["impl"]].append((shape["n"], value))
    return {key: {impl: sorted(points) for impl, points in sorted(found.items())} for key, found in plots.items()}


def draw(all_rows: Sequence[rows.Row], folder: Path) -> list[Path]:
    """The plots that have at least two sizes.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = _pyplot()
    written = []
    for column, (name, label) in QUANTITIES.items():
        for (op, device, dtype, d), found in curves(all_rows, column).items():
            if max(len(points) for points in found.values()) < 2:
                continue
            figure, axes = plt.subplots(figsize=(6, 4))
            for impl, points in found.items():
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=impl, color=COLOURS.get(impl))
            axes.set(xscale="log", yscale="log", xlabel="N (pairs)", ylabel=label, title=f"{op}, {dtype}, D = {d}")
            axes.set_xscale("log", base=2)
            axes.grid(visible=True, which="major", alpha=0.3)
            axes.legend(fontsize=8)
            written.append(_save(plt, figure, folder / f"{op}_{device}_{dtype}_d{d}_{name}.svg"))
    return written


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError("matplotlib is not installed (pip install matplotlib): no plots") from error
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "fastclip", "svg.fonttype": "none"})  # the same rows make the same file
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    files = [Path(name) for name in (sys.argv[1:] if arguments is None else arguments)] or [RESULTS / "cpu.csv"]
    try:
        for file in files:
            for path in draw(rows.read(file), file.parent):
                print(path)
    except UserError as error:
        print(f"benchmarks.plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
