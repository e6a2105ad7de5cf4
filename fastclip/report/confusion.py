"""A confusion matrix as a reader wants it: counts in cells while they fit, else a picture, and the worst mistakes."""

from __future__ import annotations

from dataclasses import dataclass

from fastclip.report.charts import matrix_png
from fastclip.report.inputs import ZeroShot

CELLS = 20  # classes up to which every count is written out
MISTAKES = 8


@dataclass(frozen=True)
class Cell:
    count: int
    depth: float  # of the colour, the root of the share of the true class
    right: bool


@dataclass(frozen=True)
class Mistake:
    true: str
    predicted: str
    count: int
    share: float  # of the true class's images


@dataclass(frozen=True)
class ConfusionView:
    rows: list[tuple[str, list[Cell], float | None]]  # true class, its cells, its recall; empty if there are too many
    picture: str  # a data URI, where rows is empty
    span: int  # classes to a pixel of the picture
    mistakes: list[Mistake]
    wrong: int


def confusion_view(one: ZeroShot) -> ConfusionView:
    """The view of a set that has a confusion matrix."""
    matrix, names = one.confusion or [], one.classnames
    totals = [sum(row) for row in matrix]
    mistakes = [
        Mistake(names[i], names[j], count, count / totals[i])
        for i, row in enumerate(matrix)
        for j, count in enumerate(row)
        if i != j and count
    ]
    mistakes.sort(key=lambda mistake: (-mistake.count, -mistake.share))
    wrong = sum(mistake.count for mistake in mistakes)
    if len(names) > CELLS:
        picture, span = matrix_png(matrix)
        return ConfusionView([], picture, span, mistakes[:MISTAKES], wrong)
    rows = [
        (
            name,
            [Cell(count, (count / total) ** 0.5 if total else 0.0, i == j) for j, count in enumerate(row)],
            row[i] / total if total else None,
        )
        for i, (name, row, total) in enumerate(zip(names, matrix, totals, strict=True))
    ]
    return ConfusionView(rows, "", 1, mistakes[:MISTAKES], wrong)
