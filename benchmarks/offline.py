"""`python -m benchmarks.offline`: every Triton configuration compiled without a GPU, and what its code takes.

Writes one row a kernel, configuration and architecture: registers of a thread, spilled bytes, shared memory of a block,
tensor-core instructions and bulk tensor copies (TMA). What was compiled before comes from Triton's cache.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fastclip.testing import SHARED_BYTES

RESULTS = Path(__file__).parent / "results" / "offline.csv"
MODULES = {
    "contrastive_loss": ("contrastive_loss.triton",),
    "sigmoid_loss": ("sigmoid_loss.triton",),
    "attention": ("attention.triton", "attention.triton_pooled"),
    "layer_norm": ("layer_norm.triton",),
    "activation": ("activation.triton",),
}
CAPABILITIES = (80, 90, 100)
KEY = ("op", "kernel", "types", "constants", "options", "capability")
COLUMNS = (*KEY, "registers", "spilled_bytes", "shared_bytes", "tensor_core", "products", "bulk_copies", "triton")
# In the PTX, by generation; tcgen05 is Blackwell's
TENSOR_CORE = {"tcgen05": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma": r"mma\.sync"}

Row = dict[str, str]


def configurations(ops: Sequence[str] = tuple(MODULES)) -> Iterator[tuple[Row, dict[str, Any]]]:
    """(what names the configuration, what `fastclip.testing.compile_offline` takes), for every architecture."""
    for op in ops:
        for module in MODULES[op]:
            for case in filter(_is_listed, import_module(f"fastclip.ops.{module}").configurations()):
                for capability in CAPABILITIES:
                    yield _named(op, case, capability), {**case, "capability": capability}


def _is_listed(case: dict[str, Any]) -> bool:
    """All but attention's 600: of those the heads of 64 dimensions in bf16. Its tests compile the others."""
    types = case["types"]
    kind = types.get("qkv_ptr", types.get("q_ptr", "*bf16"))
    return case["constants"].get("D", 64) == 64 and kind == "*bf16"


def _named(op: str, case: dict[str, Any], capability: int) -> Row:
    types = {name: kind for name, kind in case["types"].items() if name not in case["constants"]}
    parts = {"types": types, "constants": case["constants"], "options": case["options"]}
    named = {name: json.dumps(part) for name, part in parts.items()}
    return {"op": op, "kernel": case["kernel"].fn.__name__.strip("_"), **named, "capability": str(capability)}


def measured(case: dict[str, Any]) -> Row:
    """What the compiled code takes; run without TRITON_INTERPRET."""
    import triton

    from fastclip.testing import compiled_offline, usage_of

    compiled = compiled_offline(**case)
    usage, ptx = usage_of(compiled), compiled.asm["ptx"]
    found = {name: len(re.findall(pattern, ptx)) for name, pattern in TENSOR_CORE.items()}
    kind = next((name for name, count in found.items() if count), "")
    return {
        "registers": str(usage.registers),
        "spilled_bytes": str(usage.stack_bytes),
        "shared_bytes": str(usage.shared_bytes),
        "tensor_core": kind,
        "products": str(found.get(kind, 0)),
        "bulk_copies": str(len(re.findall(r"cp\.async\.bulk\.tensor", ptx))),
        "triton": triton.__version__,
    }


def read(path: Path = RESULTS) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(rows: Sequence[Row], path: Path = RESULTS) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def faults(rows: Sequence[Row]) -> list[str]:
    """Why a compiled kernel would be slow or could not start."""
    found = []
    for row in rows:
        name = f"{row['kernel']} {row['constants']} {row['options']} on sm_{row['capability']}"
        if int(row["spilled_bytes"]):
            found.append(f"{name} spills {row['spilled_bytes']} bytes")
        if int(row["shared_bytes"]) > SHARED_BYTES[int(row["capability"])]:
            found.append(f"{name} takes {row['shared_bytes']} bytes of shared memory")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":  # the interpreter compiles nothing: once more without it
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "benchmarks.offline", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(command, env=environment).returncode
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description=__doc__)
    parser.add_argument("--op", nargs="*", choices=tuple(MODULES), default=list(MODULES), help="only these ops")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = [row for row in read(options.out) if row["op"] not in options.op]
    for named, case in configurations(options.op):
        rows.append(named | measured(case))
        print(
            f"{len(rows):4}  {named['kernel']:28} sm_{named['capability']}  {rows[-1]['registers']} registers",
            flush=True,
        )
    order = {op: place for place, op in enumerate(MODULES)}
    write(sorted(rows, key=lambda row: order[row["op"]]), options.out)
    wrong = faults(rows)
    print("\n".join([f"wrote {len(rows)} rows to {options.out}", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
