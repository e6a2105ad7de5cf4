"""Numbers as a person reads them: one decimal for percentages, separated thousands, hours and minutes."""

from __future__ import annotations

import json
import math
from typing import Any

NOTHING = "n/a"


def percent(share: float | None) -> str:
    """0.4137 -> 41.4%; what would round to nothing is <0.1%."""
    if share is None or not math.isfinite(share):
        return NOTHING
    return "<0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%"


def count(number: float | None) -> str:
    """512000 -> 512,000."""
    return NOTHING if number is None or not math.isfinite(number) else f"{number:,.0f}"


def number(value: float | None) -> str:
    """Three significant digits: 0.00025 -> 2.5e-4, 6.2383 -> 6.24, 99.99 -> 100, 1234.5 -> 1,234."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value and abs(value) < 0.001:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """330.4 -> 5 min 30 s; two units at most."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    left, parts = round(seconds), list[str]()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        amount, left = divmod(left, size)
        if amount or parts:
            parts.append(f"{amount} {unit}" if amount else "")
    return " ".join(part for part in parts[:2] if part) or "0 s"


def plural(number: int, noun: str) -> str:
    """1 step, 1,200 steps, 10 classes."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def setting(value: Any) -> str:
    """A value of config.yaml or environment.json as it would be typed; a list of equal words is counted: 8 x A100."""
    if isinstance(value, list) and value and isinstance(value[0], str) and value == value[:1] * len(value):
        return f"{len(value)} x {value[0]}"
    return value if isinstance(value, str) else json.dumps(value, default=str)
