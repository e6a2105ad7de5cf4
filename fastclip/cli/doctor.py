"""`fastclip doctor`: what is installed, which implementation runs where and why, and what is known to clash."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from typing import Any, Literal

from fastclip.cli.clashes import clashes, deepspeed_settings
from fastclip.cli.machine import inspect_machine
from fastclip.cli.options import parse
from fastclip.cli.text import table
from fastclip.errors import UserError
from fastclip.ops._dispatch import FIRST

# op -> (what the case is, its size): pairs of a loss, tokens of the attention; the others take one size as any
PAIRS = (("512 pairs", 512), ("32,768 pairs", 32_768))
CASES: dict[str, tuple[tuple[str, int | None], ...]] = {
    "contrastive_loss": PAIRS,
    "sigmoid_loss": PAIRS,
    "attention": (
        ("50 tokens (image, ViT-B-32)", 50),
        ("77 tokens (captions, packed)", 77),
        ("577 tokens (image, ViT-L-14 at 336)", 577),
    ),
    "layer_norm": (("any size", None),),
    "activation": (("any size", None),),
}
UNIT = {"contrastive_loss": "pairs", "sigmoid_loss": "pairs", "attention": "tokens"}
DTYPES = ("float32", "bfloat16")
WIDTH = 79


@dataclass(frozen=True)
class Doctor:
    """What is installed, which implementation runs where and why, and what clashes.

    Changes nothing. The exit status is 0 also where something optional is missing.

    Example: fastclip doctor --json > doctor.json

    Example: fastclip doctor --op attention --size 197 --head-dim 80 --dtype float16
    """

    op: Literal["", "contrastive_loss", "sigmoid_loss", "attention", "layer_norm", "activation"] = ""
    """Explain this op alone."""
    size: int = 0
    """With --op: pairs of a loss or tokens of the attention, in place of the usual sizes."""
    head_dim: int = 64
    """With --op attention: dimensions of a head."""
    dtype: Literal["", "float32", "bfloat16", "float16", "float64"] = ""
    """With --op: the type of its tensors, in place of float32 and bfloat16."""
    deepspeed_config: str = ""
    """Also look into this DeepSpeed JSON for what is wrong for CLIP, or differs from what `fastclip train` sets."""
    json: bool = False
    """Print JSON instead of text."""

    def __post_init__(self) -> None:
        if not self.op and (self.size or self.dtype or self.head_dim != 64):
            raise UserError("--size, --dtype and --head-dim need --op NAME: they say what it is given")
        if self.size and self.op not in UNIT:
            raise UserError(f"--size has no meaning for {self.op}: its implementation does not depend on it")
        if self.size < 0 or self.head_dim < 1:
            raise UserError(f"--size and --head-dim must be above 0, were {self.size} and {self.head_dim}")


def main(arguments: Sequence[str]) -> None:
    """See `Doctor`."""
    options = parse(Doctor, "doctor", arguments)
    facts = inspect_machine()
    ops = [] if "torch" in facts["broken"] else _ops(("cpu", "cuda") if facts["gpus"] else ("cpu",), options)
    notes = clashes(facts)
    if options.deepspeed_config:
        notes = sorted([*deepspeed_settings(options.deepspeed_config), *notes], key=lambda note: note.level != "clash")
    report = {**facts, "ops": ops, "notes": [note._asdict() for note in notes]}
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print(_op_text(options.op, ops) if options.op and ops else _text(report))


def _ops(devices: Sequence[str], options: Doctor) -> list[dict[str, Any]]:
    """For each op, device, case and dtype: what "auto" takes, and what it says of the others."""
    import torch

    entries = []
    for op, cases in CASES.items():
        if options.op not in ("", op):
            continue
        explain = import_module(f"fastclip.ops.{op}").explain
        asked = ((f"{options.size:,} {UNIT[op]}", options.size),) if options.size else cases
        for device, (case, size), dtype in product(devices, asked, (options.dtype,) if options.dtype else DTYPES):
            arguments = [] if size is None else [size]
            more = {"head_dim": options.head_dim, "is_packed": "packed" in case} if op == "attention" else {}
            verdicts = explain(device, getattr(torch, dtype), *arguments, **more)
            entries.append(
                {
                    "op": op,
                    "device": device,
                    "case": case,
                    "size": size,
                    "dtype": dtype,
                    "verdicts": [verdict._asdict() for verdict in verdicts],
                }
            )
    return entries


def _text(report: dict[str, Any]) -> str:
    machine, cpu = report["machine"], report["cpu"]
    rows = [(name, version or "-", role) for name, (version, role) in report["packages"].items()]
    parts = [
        f"fastclip {report['fastclip']}, Python {machine['python']}, {machine['platform']}",
        f"CPU      {cpu['cores']} of {cpu['cores_of_machine']} cores, {cpu['memory_gib']:.0f} GiB, {cpu['name']}\n"
        f"         {' '.join(cpu['features']) or 'no vector features found'}\n"
        f"GPU      {_gpus(report)}\n"
        f"{_kernels('Kernels  CPU', report['kernels'])}\n{_kernels('         GPU', report['gpu_kernels'])}",
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


def _kernels(title: str, reason: str | None) -> str:
    text = reason or "compiled, loaded"
    return textwrap.fill(text, WIDTH, initial_indent=f"{title}  ", subsequent_indent=" " * (len(title) + 2))


def _gpus(report: dict[str, Any]) -> str:
    shown = [f"{gpu['name']} (sm_{gpu['capability']}, {gpu['memory_gib']:.0f} GiB)" for gpu in report["gpus"]]
    return "\n         ".join(shown) or "none that torch can use"


def _op_text(op: str, entries: list[dict[str, Any]]) -> str:
    """The op's choices, dtypes with one choice in one line, and each reason against the others once."""
    choices: dict[tuple[str, str, str], list[str]] = {}
    reasons: dict[bool, dict[tuple[str, str], list[tuple[str, str, str]]]] = {True: {}, False: {}}
    for entry in entries:
        chosen = next(verdict["impl"] for verdict in entry["verdicts"] if verdict["chosen"])
        choices.setdefault((entry["device"], entry["case"], chosen), []).append(entry["dtype"])
        for verdict in entry["verdicts"]:
            place = (entry["device"], entry["case"].partition(" (")[0], entry["dtype"])
            reasons[verdict["chosen"]].setdefault((verdict["impl"], verdict["reason"]), []).append(place)
    rows = [(device, case, ", ".join(dtypes), chosen) for (device, case, chosen), dtypes in choices.items()]
    everywhere = [(entry["device"], entry["case"].partition(" (")[0], entry["dtype"]) for entry in entries]
    lines = [op, table(rows, left=(0, 1, 2, 3), indent="  ")]
    for is_taken, title in ((True, "  taken"), (False, "  not taken")):
        said = [
            textwrap.fill(f"{impl}: {reason}{_where(places, everywhere)}", WIDTH, initial_indent="    ",
                          subsequent_indent="      ")
            for (impl, reason), places in sorted(reasons[is_taken].items())
            if reason != FIRST
        ]  # fmt: skip
        lines += [title, *said] if said else []
    return "\n".join(lines)


def _where(places: Sequence[tuple[str, ...]], everywhere: Sequence[tuple[str, ...]]) -> str:
    """(float32): the devices, cases and types that tell these places from the others; nothing for all of them."""
    said = []
    for part in range(len(everywhere[0])):
        named, all_of_them = (dict.fromkeys(place[part] for place in of) for of in (places, everywhere))
        if len(named) < len(all_of_them):
            said.append(", ".join(named))
    return f" ({'; '.join(said)})" if said else ""
