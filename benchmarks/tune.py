"""`python -m benchmarks.tune [ROWS.csv]`: fastclip/ops/tuned.json, the choices of `impl="auto"` on the GPUs measured.

An implementation counts where it was right and was timed forward and backward; "auto" counts as what it took,
PyTorch's attention as the best of its backends. A choice needs two that were measured, and holds from half-way to the
next smaller size measured to half-way to the next larger one (as factors), at the ends for a factor of 1.2.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import rows, table
from benchmarks.cases.attention import CAPTIONS
from fastclip.ops import _tuned

BEYOND = 1.2  # times the largest or smallest size that was measured
BACKENDS = "sdpa_"  # PyTorch's attention by one of its backends

Kind = tuple[str, str, str, str]  # GPU, op, dtype, kind


def choices(measured: Iterable[rows.Row]) -> list[_tuned.Choice]:
    """Of all GPUs in the rows."""
    times: dict[Kind, dict[int, dict[str, float]]] = {}
    for row in measured:
        named = _named(row)
        if row["device"] != "cuda" or row["phase"] != "both" or not row["p50_ms"] or named is None:
            continue
        op, kind, size = named
        impl = _implementation(row)
        if impl not in import_module(f"fastclip.ops.{op}").IMPLS:
            continue
        (gpu,) = rows.machines([row])
        of_size = times.setdefault((gpu, op, row["dtype"], kind), {}).setdefault(size, {})
        of_size[impl] = min(float(row["p50_ms"]), of_size.get(impl, math.inf))
    return [choice for kind, by_size in sorted(times.items()) for choice in _of_kind(kind, by_size)]


def _named(row: rows.Row) -> tuple[str, str, int] | None:
    """Op, kind and size of the input, as the op looks them up; None for rows that decide nothing."""
    sizes = json.loads(row["shape_json"])
    if row["op"] in ("contrastive_loss", "sigmoid_loss"):
        return row["op"], f"{sizes['d']} dimensions", sizes["n"]
    if row["op"] in ("attention", "causal_attention"):
        return "attention", f"heads of {sizes['d']}", sizes["n"]
    if row["op"] == "packed_attention":
        return "attention", f"heads of {sizes['d']}, packed", max(CAPTIONS)
    if row["op"] == "layer_norm":
        return row["op"], "with a residual", sizes["n"] * sizes["d"]
    if row["op"] in ("gelu", "quick_gelu"):
        return "activation", row["op"], sizes["n"] * sizes["d"]
    return None


def _implementation(row: rows.Row) -> str:
    if row["impl"] == "auto":
        return row["peer_version"].split()[-1]
    if row["op"] in ("layer_norm", "gelu", "quick_gelu") and row["impl"] == "eager":
        return "reference"  # which is that code
    return "sdpa" if row["impl"].startswith(BACKENDS) else row["impl"]


def _of_kind(kind: Kind, by_size: Mapping[int, Mapping[str, float]]) -> list[_tuned.Choice]:
    sizes = sorted(by_size)
    middles = [math.isqrt(a * b) for a, b in pairwise(sizes)]
    least = [math.ceil(sizes[0] / BEYOND), *(middle + 1 for middle in middles)]
    most = [*middles, math.floor(sizes[-1] * BEYOND)]
    found = []
    for size, first, last in zip(sizes, least, most, strict=True):
        order = sorted(by_size[size], key=by_size[size].__getitem__)
        if len(order) > 1:
            because = f"measured at {size:,}: " + ", ".join(f"{name} {by_size[size][name]:.3g} ms" for name in order)
            found.append(_tuned.Choice(*kind, first, last, tuple(order), because))
    return found


def to_json(found: Sequence[_tuned.Choice]) -> str:
    """One choice a line."""
    lines: list[dict[str, Any]] = [choice._asdict() for choice in found]
    return "[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", type=Path, nargs="?", default=table.GPU, help=f"a GPU's rows ({table.GPU.name})")
    parser.add_argument("--out", type=Path, default=_tuned.FILE, help="the file (that of the package)")
    options = parser.parse_args(arguments)
    found = choices(rows.read(options.rows))
    options.out.write_text(to_json(found))
    print(f"wrote {len(found)} choices to {options.out}")


if __name__ == "__main__":
    main()
