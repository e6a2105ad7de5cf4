"""How the verbs write to a terminal: aligned tables, and words from data files made safe to print."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence


def table(rows: Sequence[Sequence[object]], left: Sequence[int] = (0,), indent: str = "") -> str:
    """Rows as aligned columns, two blanks apart: those numbered in `left` to the left, the others to the right.

    In a terminal that is too narrow the last column goes on below itself.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    hang = len(indent) + sum(width + 2 for width in widths[:-1])
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(_fitted(indent + "  ".join(padded).rstrip(), hang))
    return "\n".join(lines)


def _fitted(line: str, hang: int) -> str:
    """`line` broken at the width of the terminal, `hang` blanks before what follows; whole where it goes elsewhere."""
    width = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or len(line) <= width or hang > width // 2:
        return line
    return line[:hang] + textwrap.fill(line[hang:], width - hang).replace("\n", "\n" + " " * hang)


def printable(text: str) -> str:
    """`text` in one line without control characters: what a shard holds may be anything."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def megabytes(size: float) -> str:
    """Bytes as people read them: `1.2 GB`, `34.5 MB`, `6.7 kB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"
