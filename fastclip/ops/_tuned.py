"""What was the fastest on this GPU: `tuned.json`, which `python -m benchmarks.tune` makes of a GPU's rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fastclip.ops import _dispatch

UNTUNED = "not measured on this GPU"
FILE = Path(__file__).with_name("tuned.json")
_HALF = (torch.bfloat16, torch.float16)  # either stands for the other where that was not measured


class Choice(NamedTuple):
    """The implementations of an op, fastest first, for inputs of one kind and of `least` to `most` in size."""

    gpu: str
    op: str
    dtype: str
    kind: str  # what else the choice depends on, in the op's own words
    least: int
    most: int
    order: tuple[str, ...]
    because: str  # their times, for `fastclip doctor`


def _read() -> tuple[Choice, ...]:
    return tuple(Choice(**entry | {"order": tuple(entry["order"])}) for entry in json.loads(FILE.read_text()))


def by_input(choices: Iterable[Choice]) -> dict[tuple[str, str, str, str], list[Choice]]:
    """GPU, op, type and kind -> its sizes."""
    table: dict[tuple[str, str, str, str], list[Choice]] = {}
    for choice in choices:
        table.setdefault((choice.gpu, choice.op, choice.dtype, choice.kind), []).append(choice)
    return table


TABLE = by_input(_read())


def gpu_name() -> str:
    """Of the current device, as torch calls it; "" without one."""
    return _name(torch.cuda.current_device()) if torch.cuda.is_available() else ""


@cache
def _name(device: int) -> str:
    return torch.cuda.get_device_name(device)


gpu_name._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see fastclip.ops.attention.implementations


def find(op: str, device_type: str, dtype: torch.dtype, size: int, kind: str) -> Choice | None:
    """What this GPU has measured for such an input; None where it has not, or there is none."""
    if device_type != "cuda":
        return None
    gpu = gpu_name()
    for name in dict.fromkeys((dtype, *_HALF)) if dtype in _HALF else (dtype,):
        for choice in TABLE.get((gpu, op, str(name).removeprefix("torch."), kind), ()):
            if choice.least <= size <= choice.most:
                return choice
    return None


def order(choice: Choice | None, otherwise: tuple[str, ...]) -> tuple[str, ...]:
    """What "auto" tries: what was measured, fastest first, then the rest of `otherwise`."""
    return otherwise if choice is None else tuple(dict.fromkeys((*choice.order, *otherwise)))


def because(choice: Choice | None, device_type: str, untuned: str = UNTUNED) -> str:
    """Why "auto" takes what it takes, for `fastclip doctor`."""
    if choice is not None:
        return choice.because
    return untuned if device_type == "cuda" else _dispatch.FIRST
