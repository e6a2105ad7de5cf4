"""`fastclip doctor`: what is installed, which implementation runs where and why, and what is known to clash."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastclip.cli.clashes import clashes
from fastclip.cli.machine import inspect_machine
from fastclip.cli.options import parse
from fastclip.cli.text import table

# op -> (what the case is, its size): pairs of a loss, tokens of the attention
PAIRS = (("512 pairs", 512), ("32,768 pairs", 32_768))
CASES = {
    "contrastive_loss": PAIRS,
    "sigmoid_loss": PAIRS,
    "attention": (
        ("50 tokens (image, ViT-B-32)", 50),
        ("77 tokens (text)", 77),
        ("577 tokens (image, ViT-L-14 at 336)", 577),
    ),
}
DTYPES = ("float32", "bfloat16")
WIDTH = 79


@dataclass(frozen=True)
class Doctor:
    """What is installed, which implementation runs where and why, and what clashes.

    Changes nothing. The exit status is 0 also where something optional is missing.

    Example: fastclip doctor --json > doctor.json
    """

    json: bool = False
    """Print JSON instead of text."""


def main(arguments: Sequence[str]) -> None:
    """See `Doctor`."""
    options = parse(Doctor, "doctor", arguments)
    facts = inspect_machine()
    ops = [] if "torch" in facts["broken"] else _ops(("cpu", "cuda") if facts["gpus"] else ("cpu",))
    report = {**facts, "ops": ops, "notes": [note._asdict() for note in clashes(facts)]}
    print(json.dumps(report, indent=1) if options.json else _text(report))


def _ops(devices: Sequence[str]) -> list[dict[str, Any]]:
    """For each op, device, case and dtype: what "auto" takes, and what it says of the others."""
    import torch

    from fastclip.ops import attention, contrastive_loss, sigmoid_loss

    explain: dict[str, Any] = {
        op.__name__.rpartition(".")[2]: op.explain for op in (attention, contrastive_loss, sigmoid_loss)
    }
    return [
        {
            "op": op,
            "device": device,
            "case": case,
            "dtype": dtype,
            "verdicts": [verdict._asdict() for verdict in explain[op](device, getattr(torch, dtype), size)],
        }
        for op, cases in CASES.items()
        for device in devices
        for case, size in cases
        for dtype in DTYPES
    ]


def _text(report: dict[str, Any]) -> str:
    machine, cpu = report["machine"], report["cpu"]
    rows = [(name, version or "-", role) for name, (version, role) in report["packages"].items()]
    parts = [
        f"fastclip {report['fastclip']}, Python {machine['python']}, {machine['platform']}",
        f"CPU      {cpu['cores']} of {cpu['cores_of_machine']} cores, {cpu['memory_gib']:.0f} GiB, {cpu['name']}\n"
        f"         {' '.join(cpu['features']) or 'no vector features found'}\n"
        f"GPU      {_gpus(report)}\n"
        f"Kernels  {report['kernels'] or 'compiled for the CPU, loaded'}",
        f"Packages\n{table(rows, left=(0, 1, 2), indent='  ')}",
    ]
    parts += [_op_text(op, [entry for entry in report["ops"] if entry["op"] == op]) for op in CASES if report["ops"]]
    marks = {"clash": "!", "note": "-"}
    notes = [
        textwrap.fill(note["text"], WIDTH, initial_indent=f"  {marks[note['level']]} ", subsequent_indent="    ")
        for note in report["notes"]
    ]
    clashing = sum(note["level"] == "clash" for note in report["notes"])
    parts.append("\n".join([f"Known clashes: {clashing or 'none'} (marked !); and what to know", *notes]))
    return "\n\n".join(parts)


def _gpus(report: dict[str, Any]) -> str:
    shown = [f"{gpu['name']} (sm_{gpu['capability']}, {gpu['memory_gib']:.0f} GiB)" for gpu in report["gpus"]]
    return "\n         ".join(shown) or "none that torch can use"


def _op_text(op: str, entries: list[dict[str, Any]]) -> str:
    """The op's choices, dtypes with one choice in one line, and each reason against the others once."""
    choices: dict[tuple[str, str, str], list[str]] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        chosen = next(verdict["impl"] for verdict in entry["verdicts"] if verdict["chosen"])
        choices.setdefault((entry["device"], entry["case"], chosen), []).append(entry["dtype"])
        for verdict in entry["verdicts"]:
            if not verdict["chosen"]:
                reasons.setdefault((verdict["impl"], verdict["reason"]), []).append(entry["case"].partition(" (")[0])
    rows = [(device, case, ", ".join(dtypes), chosen) for (device, case, chosen), dtypes in choices.items()]
    against = [
        textwrap.fill(f"{impl}: {reason}{where}", WIDTH, initial_indent="    ", subsequent_indent="      ")
        for (impl, reason), cases in sorted(reasons.items())
        for where in ["" if len(cases) == len(entries) else f" ({', '.join(dict.fromkeys(cases))})"]
    ]
    return "\n".join([op, table(rows, left=(0, 1, 2, 3), indent="  "), "  not taken", *against])
