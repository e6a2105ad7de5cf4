"""What the verbs' options share: one way to parse them, and the two that mean a model and its held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro

_T = TypeVar("_T")


def optional(metavar: str, default: str) -> Any:
    """How the help shows an option that may stay empty: `--name METAVAR ... (default: ...)`."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


Checkpoint = Annotated[str, optional("PATH", "the newest run in runs/")]
Data = Annotated[str, optional("DIR", "the run's")]
TokenizerPath = Annotated[str, optional("PATH", "tokenizer.json beside the weights, else CLIP's")]
Precision = Literal["fp32", "bf16"]


def parse(kind: type[_T], verb: str, arguments: Sequence[str]) -> _T:
    """`arguments` as the dataclass `kind`, whose docstrings are the help; SystemExit behind a help or a mistake."""
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(kind, prog=f"fastclip {verb}", args=list(arguments), config=config)
