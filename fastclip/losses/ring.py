"""The contrastive block with the texts passed round a ring: O(B D) memory for B pairs a rank, the same sums.

In W steps each rank sees the texts of every other. What is known of a block of texts, its columns' statistics or its
gradient, follows it one step behind and comes home after the last. While a rank computes on one block, the next one
arrives.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastclip.distributed import Passing
from fastclip.losses.blocks import Mask, Problem, block_gradients, block_statistics
from fastclip.ops.contrastive_loss.reference import merge


def statistics(problem: Problem) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """As `gathered.statistics`."""
    rows: list[Tensor] = []
    behind: Passing | None = None
    for owner, (text, text_ids, _) in _blocks(problem, None):
        found, columns, _ = block_statistics(problem, text, text_ids, _mask(problem, owner, text))
        rows = _merged(rows, found[1:]) if rows else found[1:]
        if behind is None:
            positive = found[0]  # of this rank's own block: the others hold no positives of its images
        else:
            columns = _merged(list(behind.wait()[0].unbind(1)), columns)
        behind = _follow(problem, owner, torch.stack(columns, 1))
    assert behind is not None
    columns = list(behind.wait()[0].unbind(1))
    return [positive, *rows], columns, columns[:2]


def gradients(
    problem: Problem,
    kept: list[Tensor],
    row_lse: tuple[Tensor, Tensor],
    d_positive: Tensor,
    d_rows: list[Tensor],
    d_columns: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """As `gathered.gradients`."""
    grad_image: Tensor | None = None
    behind: Passing | None = None
    for owner, (text, text_ids, columns) in _blocks(problem, torch.stack((*kept, *d_columns), 1)):
        assert columns is not None
        col_max, col_log_sum, *d_cols = columns.unbind(1)
        lse = (*row_lse, col_max, col_log_sum)
        more_image, grad_text = block_gradients(
            problem, text, text_ids, _mask(problem, owner, text), lse, text.new_empty(0), d_positive, d_rows, d_cols
        )
        grad_image = more_image if grad_image is None else grad_image.add_(more_image)
        if behind is not None:
            grad_text.add_(behind.wait()[0])
        behind = _follow(problem, owner, grad_text)
    assert grad_image is not None
    assert behind is not None
    return grad_image, behind.wait()[0]


def _blocks(
    problem: Problem, columns: Tensor | None
) -> Iterator[tuple[int, tuple[Tensor, Tensor | None, Tensor | None]]]:
    """(owner, (text, text_ids, columns)) of every rank, this one first, then from its neighbour on."""
    counts, rank, group = problem.layout.texts, problem.layout.rank, problem.layout.group
    assert group is not None
    block = [x for x in (problem.text, problem.text_ids, columns) if x is not None]
    for step in range(len(counts)):
        owner, last = (rank - step) % len(counts), step + 1 == len(counts)
        passing = None if last else Passing(block, counts[owner - 1], group)
        left = iter(block)
        text, text_ids, cols = (None if x is None else next(left) for x in (problem.text, problem.text_ids, columns))
        assert text is not None
        yield owner, (text, text_ids, cols)
        block = block if passing is None else passing.wait()


def _follow(problem: Problem, owner: int, x: Tensor) -> Passing:
    """Sends x on after its owner's texts; what comes is of the owner before."""
    group = problem.layout.group
    assert group is not None
    return Passing([x], problem.layout.texts[owner - 1], group)


def _mask(problem: Problem, owner: int, text: Tensor) -> Mask:
    if owner != problem.layout.rank:
        return text.shape[0], None
    return 0, problem.labels


def _merged(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """[max, log_sum, *sums] of two sets from those of each."""
    return [*merge((a[0], a[1]), (b[0], b[1])), *(x + y for x, y in zip(a[2:], b[2:], strict=True))]
